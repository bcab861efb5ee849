"""The names that the command line knows, and nothing else: help texts need neither torch nor data.

A new model, loss or data set is built in its own room and named here, in the same order; tests compare these lists
with what is there. Of a model this is for the help alone: every registered name is taken.
"""

LOSSES = ("crossentropy", "focal", "focal6x100", "focal2_6", "focal2_2", "smoothap", "exponential1", "2bce")
LABELLED_SETS = ("DoTA", "DoTA_half", "DADA2K", "DADA2K_half", "CAP-DATA", "Nexar", "CCD", "DAD", "A3D", "csv")
UNLABELLED_SETS = ("BDD100K", "Kinetics", "videos")
CLASSIFIERS = (
    "vit_tiny_patch16_64",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch16_224",
    "mvd_vit_tiny_patch16_64",
    "mvd_vit_small_patch16_224",
    "mvd_vit_base_patch16_224",
    "mvd_vit_large_patch16_224",
    "umt_vit_tiny_patch16_64",
    "umt_vit_small_patch16_224",
    "umt_vit_base_patch16_224",
    "umt_vit_large_patch16_224",
    "internvideo2_tiny_patch14_56",
    "internvideo2_small_patch14_224",
    "internvideo2_base_patch14_224",
    "internvideo2_large_patch14_224",
    "vivit_tiny_patch16_64",
    "vivit_base_patch16_224",
    "vjepa2_vit_tiny_patch16_64",
    "vjepa2_vit_large_patch16_256",
    "vjepa21_vit_tiny_patch16_64",
    "vjepa21_vit_base_patch16_384",
    "vjepa21_vit_large_patch16_384",
)
# VideoMAE's own have "videomae_" in place of "vit_".
MASKED_AUTOENCODERS = tuple(
    "pretrain_" + (name.replace("vit_", "videomae_", 1) if name.startswith("vit_") else name) for name in CLASSIFIERS
)
LABELS = ("own", "consensus", "consensus_ego")  # of a data set's frames, see datasets/formats/consensus.py
DECODINGS = ("small", "full", "exact")  # of JPEGs, for training
