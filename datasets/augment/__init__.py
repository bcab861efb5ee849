"""From decoded frames to model input. Workers shrink and draw; the device does what was drawn, normalises and erases.

An augmentation is called with what reads the frames of a clip, the random generator of the sample and the memory for
its video, uint8 (V, T, S, S, 3); it fills that and returns what it drew (`Draws`, boxes, masks), tensors with a leading
axis of V views. Every random draw comes from that generator, so a clip looks the same whichever worker or rank prepares
it. Without a GPU the worker does at once what it drew, by the same code.

To add an operation on a clip, see operations.py and DRIVING_OPS in randaugment.py: RandAugment draws it then. One that
is done to each frame as it is read goes into FinetuneTransform.__call__ or PretrainTransform.__call__, one on
normalised video into device.py. Its strength is an argument of the class, which `training_data` in run_finetune.py or
`build_dataset` in run_dapt.py passes. To replace the whole, write a class with the two methods of
`datasets.loader.Transform`.
"""
