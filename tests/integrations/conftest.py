"""Fixtures for the tests of integrations: msda.drop_in, and packages on the path."""

import importlib
import textwrap

import pytest
import torch.nn.functional as F

from msda import forms
from tests.integrations.stand_in_packages import forget


@pytest.fixture
def drop_in():
    """The module, uninstalled: importing it installs."""
    import msda.drop_in

    msda.drop_in.uninstall()
    yield msda.drop_in
    msda.drop_in.uninstall()
    forget()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files of packages into a folder on sys.path, with all __init__.py that they need."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in path.parents:
                if folder == tmp_path:
                    break
                (folder / "__init__.py").touch()
            if isinstance(text, bytes):
                path.write_bytes(text)
            else:
                path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return tmp_path

    return write


class Calls(dict):
    """Empty at first, and again once cleared."""

    def __init__(self):
        super().__init__(ours=[], theirs=[])

    def clear(self):
        for made in self.values():
            made.clear()


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of ours, and a mark for each call of theirs."""
    made = Calls()
    ours, theirs = forms.ms_deform_attn, F.grid_sample

    def counted(*args, **options):
        made["ours"].append(args)
        return ours(*args, **options)

    def grid_sample(*args, **options):
        made["theirs"].append(None)
        return theirs(*args, **options)

    monkeypatch.setattr(forms, "ms_deform_attn", counted)
    monkeypatch.setattr(F, "grid_sample", grid_sample)
    return made
