"""The flags of simple-tad's commands that are gone, and the answer to each; docs/simple-tad.md lists them beside those
that are still there.

A key is a flag, or a flag and the value for which there is another answer: "--short_side_size 224".
"""

_NO_EFFECT = "it had no effect in simple-tad either"
_TORCHRUN = "torchrun sets it"
_ONE_PATH = "DistributedDataParallel with bf16 is the one path"
_LISTS = ("data_set", "data_path", "batch_size", "sampling_rate")  # one value for each data set of a mix
_COMMON = {
    "--warmup_lr": "the warm-up starts at 0, as it did in simple-tad whatever was given",
    "--momentum": "optimizers of --opt use timm's own",
    "--imagenet_default_mean_and_std": "the model's mean and standard deviation are used",
    **dict.fromkeys(("--world_size", "--local_rank", "--dist_url", "--dist_on_itp"), _TORCHRUN),
    "--color_jitter": _NO_EFFECT,
}
FINETUNE = _COMMON | {
    "--nb_classes": "the task has two classes, safe and anomalous",
    "--enable_deepspeed": _ONE_PATH,
    "--zero_stage": _ONE_PATH,
    "--bf16": "bf16 is the default on a GPU; --precision names another",
    "--dist_eval": "evaluation always runs on every process",
    "--short_side_size 224": "leave it out; 224 meant full size, which is the default",
    "--short_side_size": "it scaled DoTA's frames by 224 / its value; --short_side takes the pixels wanted",
    "--num_segments": "a window is one segment",
    "--test_num_segment": "evaluation scores every window once",
    "--test_num_crop": "evaluation uses the whole frame",
    "--eval_data_path": "use --data_path with --eval_split",
    "--sampling_rate_val -1": "give the value of --sampling_rate, for which -1 stood",
    "--final_reduction none": "the head takes one vector; use fc_norm, the mean of the tokens, or cls, the first",
    "--no_cls_in_ckpt": "whether a file has a class token is seen from its position table",
    "--delete_head": "a head of other classes is left out by itself, and said",
    "--no_use_decord": "the reader of a video is chosen by what reads it right",
    "--remove_pos_emb": "positions are always added, as for the published weights",
    "--use_cls_token": "no published VideoMAE or MVD has a class token",
    "--use_mean_pooling": "it is the default; see --final_reduction",
    **dict.fromkeys(("--crop_pct", "--resplit", "--eval_option", "--smoothing", "--head_drop_path"), _NO_EFFECT),
    **dict.fromkeys(("--mixup", "--cutmix", "--cutmix_minmax", "--mixup_prob", "--mixup_switch_prob"), _NO_EFFECT),
    "--mixup_mode": _NO_EFFECT,
}
DAPT = _COMMON | {
    "--mask_type": "tube masking is the one kind",
    "--normlize_target": "it is the default; --no_normalize_target turns it off",
    "--no_cls_in_ckpt": FINETUNE["--no_cls_in_ckpt"],
    "--train_interpolation": _NO_EFFECT,
    **{f"--{n}{k}": f"--{n} takes a list" for n in _LISTS for k in (1, 2)},
}
