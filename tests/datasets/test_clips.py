import numpy as np
import pytest
from helpers import golden

from datasets.clips import Clip
from datasets.labels import smooth_labels, time_to_anomaly


@pytest.mark.parametrize("case", golden("ttc")["cases"], ids=lambda c: c["name"])
def test_golden(case):
    ttc = time_to_anomaly(case["labels"], case["fps"], case["TT"], case["TA"])
    if any(case["labels"]):
        np.testing.assert_allclose(ttc, case["ttc"], atol=1e-6)
    else:
        assert np.isnan(ttc).all()  # the reference says 0, as it does inside an anomaly
    soft = smooth_labels(case["labels"], ttc, case["TT"], case["TA"])
    assert soft.dtype == np.float32
    np.testing.assert_allclose(soft, np.array(case["smoothed"])[:, 1], atol=1e-6)


def test_clip_knows_its_frames():
    clip = Clip("a", "frames/a", 3, 10.0, frame_name="{:04d}.png", first_frame=1, labels=np.array([0, 1, 0], np.uint8))
    assert clip.filename(0) == "0001.png"
    np.testing.assert_allclose(clip.ttc, [-0.1, 0, 0.1])
    with pytest.raises(ValueError, match="clip b: 2 labels for 3 frames"):
        Clip("b", "frames/b", 3, 10.0, labels=np.zeros(2, np.uint8))
