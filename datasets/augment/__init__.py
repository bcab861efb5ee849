"""From decoded frames to model input. Workers draw and hand over uint8; the device normalises and erases.

An augmentation is called with the frames of a clip, each uint8 (H, W, 3), and the random generator of the sample; it
returns {"video": uint8 (V, 3, T, S, S), ...}, tensors with a leading axis of V views. Every random draw comes from that
generator, so a clip looks the same whichever worker or rank prepares it.

To add one, write its class in a module here, and build it where run_finetune.py or run_dapt.py build their
`datasets.loader.Source`. To change which operations RandAugment draws from, edit DRIVING_OPS in randaugment.py.
"""
