"""From decoded frames to model input. Workers draw and hand over uint8; the device normalises and erases.

An augmentation is called with the frames of a clip, each uint8 (H, W, 3), and the random generator of the sample; it
returns {"video": uint8 (V, 3, T, S, S), ...}, tensors with a leading axis of V views. Every random draw comes from that
generator, so a clip looks the same whichever worker or rank prepares it.

To add an operation, write (clip uint8 (T, H, W, 3), rng) -> the same in a module here and call it in
FinetuneTransform.augment or PretrainTransform.__call__; its strength is an argument of that class, which
`training_data` in run_finetune.py or `build_dataset` in run_dapt.py passes. To replace the whole, write a class that
returns the same tensors: "video", "boxes", "seed", for DAPT "video", "mask". What is done after normalisation is in
device.py. To change which operations RandAugment draws from, edit DRIVING_OPS in randaugment.py.
"""
