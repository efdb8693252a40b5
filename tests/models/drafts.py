"""What drafts in the tests of lossless decoding; good, absurd, and perfect."""

import visionpulse as vp

DRAFTS = {
    "paper": vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4)),
    "lookback": vp.PulseConfig(tau=0.5, ratio=(0.05, 0.4), schedule="lookback", refresh=0),
    "blind": vp.PulseConfig(budget=vp.TopK(1), schedule="per_layer"),
    "all-of-it": vp.PulseConfig(ratio=(1.0, 1.0)),
}
