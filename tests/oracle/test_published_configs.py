"""The published configurations of a public wheel: as many parameters as Transformers counts, or a stated reason.

Needs the extra ``configs``; skipped where it is not installed. benchmarks/configs.py writes docs/configs.md in the same way.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_every_published_config_is_counted_or_refused_with_a_reason(monkeypatch):
    pytest.importorskip("aiconfigurator_core", reason="aiconfigurator-core is not installed (extra configs)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra configs)")
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.configs import configs, ours, theirs

    files = configs()
    assert len(files) == 89
    for path in files:
        (mine, why), (other, _) = ours(path), theirs(path)
        if mine is None:
            assert " has " in why, path.name  # the part of the model that is not described
        elif other is not None:
            assert mine == other, path.name
