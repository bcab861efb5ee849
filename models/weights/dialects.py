"""The kinds of published checkpoint files: how each is recognised, and which of its keys are left out on purpose."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """How one kind of published file is recognised and read. All patterns match whole keys.

    The defaults are VideoMAE's. Keys are brought together by their prefix and the name of the final norm alone: where
    more must be renamed, the modules are named as in the file, or a converter in other_models/ writes another file.

    marks: a pattern that at least one key matches, as it stands or without the prefixes of wrappers; our own files of
        the family should match it too.
    absent: a pattern that no key matches, without the prefixes of wrappers.
    shapes: key -> pattern of its shape, written like 768x384, where these tell families with the same keys apart.
    family: what the file must say of itself.
    prefix: pattern of what stands before the encoder's keys.
    final_norm: pattern of the names of the encoder's final norm, all the same tensor.
    ignored: patterns of keys that are left out on purpose where the model has no place for them.
    fresh: pattern of what a classifier may lack, in our names; each module wholly or not at all.
    own_target: the decoder predicts something else than pixels, so a masked autoencoder does without it too.
    models: pattern of the names of the models it is for.
    pos_embed: the pos_embed_kind of the models it is for, unless the file names its model; None: any.
    stored_table: the file has that table.
    inflated: a patch embedding of one frame is repeated for a model with more, as in I3D (arXiv:1705.07750).
    """

    name: str
    marks: str
    absent: str | None = None
    shapes: dict[str, str] = field(default_factory=dict)
    family: str | None = None
    prefix: str = r"encoder\."
    final_norm: str = r"(fc_)?norm"
    ignored: tuple[str, ...] = ()
    fresh: str = r"(head|pooler)\..+"
    own_target: bool = False
    models: str = r"(pretrain_videomae|vit)_.+"
    pos_embed: str | None = "sinusoid"
    stored_table: bool = False
    inflated: bool = False


_BLOCK = r"blocks\.\d+\.(norm1|norm2|attn|attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias|q_bias|v_bias)"
_PIXEL_DECODER = (
    r"mask_token",
    r"encoder_to_decoder\.weight",
    rf"decoder\.{_BLOCK}",
    r"decoder\.(norm|head)\.(weight|bias)",
)
_PROBE = (r"head\.(weight|bias)", r"pooler\..+")
_TUBELET_OF_TWO = r"\d+x3x2x16x16"  # 768 are not the pixels of such a token
_PLAIN = r"(pretrain_)?(videomae|vit|mvd_vit|umt_vit)_.+"
# The first that fits wins: a new one stands before every one whose marks its files match too, as those of "VideoMAE
# pre-training" (encoder.blocks), "VideoMAE V2 distilled" and "Video ViT" (blocks).
DIALECTS = (
    Dialect(
        "V-JEPA 2 of Hugging Face",
        marks=r".+",
        family="vjepa2",
        ignored=_PROBE,
        models=r"(pretrain_)?vjepa2_.+",
        pos_embed="rotary 2.0",
    ),
    Dialect(
        "ViViT of Hugging Face",
        marks=r".+",
        family="vivit",
        ignored=(r"head\.(weight|bias)", r"pooler\.dense\.(weight|bias)"),
        models=r"(pretrain_)?(vivit|vit)_.+",
        pos_embed=None,
        stored_table=True,
    ),
    Dialect(
        "VideoMAE of Hugging Face",
        marks=r".+",
        family="videomae",
        ignored=(*_PIXEL_DECODER, r"head\.(weight|bias)"),
        models=_PLAIN,
    ),
    Dialect(
        "V-JEPA 2.1",
        marks=r"((encoder|backbone)\.)?(norms_block\.\d+|patch_embed_img|img_mod_embed|video_mod_embed)(\..+)?",
        prefix=r"(encoder|backbone)\.",
        final_norm="norm",
        ignored=(*_PIXEL_DECODER, *_PROBE),
        models=r"(pretrain_)?vjepa21_.+",
        pos_embed="rotary 2.1",
    ),
    Dialect(
        "V-JEPA 2",
        marks=r"((encoder|backbone)\.)?blocks\.\d+\.attn\.qkv\.bias",
        absent=r"((encoder|backbone)\.)?(fc_norm\..+|blocks\.\d+\.attn\.[qv]_bias)|(decoder|cls_head)\..+qkv\.bias",
        prefix=r"(encoder|backbone)\.",
        final_norm="norm",
        ignored=(*_PIXEL_DECODER, *_PROBE, r"backbone\.pos_embed"),  # frozen and unused
        models=r"(pretrain_)?vjepa2_.+",
        pos_embed="rotary 2.0",
    ),
    Dialect(
        "InternVideo2",
        marks=r"(encoder\.)?clip_projector\..+",
        final_norm="norm",  # of a masked autoencoder alone; a classifier's fc_norm comes after the pooling
        ignored=(
            *_PIXEL_DECODER,
            r"(clip|mae)_pos_embed",
            r"clip_decoder\.\d+\.(head\.[02]|norm)\.(weight|bias)",
            r"final_clip_decoder\.(head\.[02]|norm)\.(weight|bias)",
            r"mae_decoder\..+",
            r"encoder\.norm\.(weight|bias)",
            r"(fc_norm|head)\.(weight|bias)",
        ),
        fresh=r"(head|pooler|fc_norm|norm)\..+",
        models=r"(pretrain_)?internvideo2_.+",
        pos_embed="learned",
        stored_table=True,
        inflated=True,
    ),
    Dialect(
        "ViViT",
        marks=r"(encoder\.)?cls_token",
        final_norm="norm",
        ignored=(*_PIXEL_DECODER, r"head\.(weight|bias)"),
        models=r"(pretrain_)?vivit_.+",
        pos_embed="learned",
        stored_table=True,
    ),
    Dialect("ViViT, converted", marks=r"encoder\.blocks\.\d+\..+", family="ViViT", pos_embed=None, stored_table=True),
    Dialect(
        "MVD pre-training",
        marks=r"decoder_(img|vid)\..+|mask_token_(img|vid)",
        prefix="",
        ignored=(
            r"pos_embed(_img|_vid)?",  # frozen tables, which the model computes
            r"mask_token_(img|vid)",
            r"down_(img|vid)\.(weight|bias)",
            rf"decoder_(img|vid)\.{_BLOCK}",
            r"decoder_(img|vid)\.(norm|head)\.(weight|bias)",
        ),
        own_target=True,
        models=r"(pretrain_)?mvd_.+",
        pos_embed="sincos_3d",
    ),
    Dialect(
        "UMT pre-training",
        marks=r"clip_decoder\.\d+\.head\.weight",
        ignored=(r"clip_decoder\.\d+\.(norm|head)\.(weight|bias)",),
        own_target=True,
        models=r"(pretrain_)?umt_.+",
        pos_embed="umt",
    ),
    Dialect(
        "MME pre-training",
        marks=r"decoder\.\d+\.blocks\..+|encoder(_q\.encoder)?\.model\.blocks\.\d+\..+",
        prefix=r"(encoder_q\.)?encoder\.(model\.)?",
        ignored=(
            r"mask_token",
            r"encoder_to_decoder\.\d+\.weight",
            rf"decoder\.\d+\.{_BLOCK}",
            r"decoder\.\d+\.norm\.(weight|bias)",
            r"decoder\.\d+\.head\.\d+\.\d+\.(weight|bias)",
        ),
        own_target=True,
    ),
    Dialect(
        "SIGMA pre-training",
        marks=r"prototypes",
        ignored=(*_PIXEL_DECODER, r"prototypes", r"head\.[0246]\.(weight|bias)", r"memory", r"memory_pred_head\..+"),
        own_target=True,
    ),
    Dialect(
        "SMILE pre-training",
        marks=r"encoder\.blocks\.\d+\..+",
        ignored=_PIXEL_DECODER,
        shapes={"decoder.head.weight": r"768x\d+", "patch_embed.proj.weight": _TUBELET_OF_TWO},
        own_target=True,
    ),
    Dialect(
        "MGMAE or VideoMAE V2 pre-training",
        marks=r"(module\.)?_orig_mod\.encoder\.blocks\.\d+\..+",
        ignored=_PIXEL_DECODER,
    ),
    Dialect("VideoMAE pre-training", marks=r"encoder\.blocks\.\d+\..+", ignored=_PIXEL_DECODER, models=_PLAIN),
    Dialect(
        "VideoMAE V2 distilled",
        marks=r"blocks\.\d+\..+",
        shapes={"head.weight": r"710x\d+", "patch_embed.proj.weight": _TUBELET_OF_TWO},
        prefix="",
        ignored=(r"head\.(weight|bias)",),
    ),
    Dialect(
        "Video ViT",
        marks=r"blocks\.\d+\..+",
        prefix="",
        ignored=(r"head\.(weight|bias)",),
        models=_PLAIN,
        pos_embed=None,
    ),
    Dialect(
        "Video ViT as a backbone",
        marks=r"backbone\.blocks\.\d+\..+",
        prefix=r"backbone\.",
        ignored=(r"head\.(weight|bias)",),
        models=_PLAIN,
        pos_embed=None,
    ),
)
