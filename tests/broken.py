"""Where the deliberately broken components are gathered."""

import pytest

BROKEN: list = []


def breaks(check, message, **options):
    """This class fails `check`, and the failure says `message`."""

    def keep(cls):
        BROKEN.append(pytest.param(check, cls, options, message, id=f"{check}-{cls.__name__}"))
        return cls

    return keep
