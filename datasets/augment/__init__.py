"""From decoded frames to model input. Workers draw and hand over uint8; the device normalises and erases.

Every random draw comes from the generator of the sample, so a clip looks the same whichever worker or rank prepares it.
"""
