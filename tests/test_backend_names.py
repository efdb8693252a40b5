"""How the backends are reached by name."""

import visionpulse as vp
from visionpulse.backends import get


def test_the_name_is_a_package_and_a_call():
    import visionpulse.backends as package
    from visionpulse.backends import cpu, names

    assert vp.backends is package and vp.backends.cpu is cpu and vp.backends.get is get
    assert tuple(vp.backends()) == names()
    assert vp.backends()["reference"] == "available"
