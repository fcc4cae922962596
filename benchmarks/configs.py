"""Ingests the published ``config.json`` files of a public wheel, counts their parameters twice, and writes docs/configs.md.

The wheel aiconfigurator-core 0.12.0 carries 89 of them. Transformers builds a model of each that it knows on the meta device,
which makes no weights; what it counts and what the planner counts are to be equal. Where either cannot, the page says why.

    python3.11 -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0 transformers==5.23.0 pyyaml
    /tmp/hf/bin/pip install --no-deps aiconfigurator-core==0.12.0
    PYTHONPATH=. /tmp/hf/bin/python benchmarks/configs.py

The exit code is the number of configurations whose counts differ.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from planner.errors import SpecError
from planner.specs.models import load_model
from planner.specs.parameters import parameter_count

__all__ = ["configs", "ours", "theirs"]

PAGE = Path(__file__).parents[1] / "docs" / "configs.md"
_SUFFIX = "_config.json"


def configs() -> list[Path]:
    """The files, by name.

    Raises:
        ImportError: the wheel is not installed.
    """
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise ImportError("aiconfigurator-core")
    folder = Path(spec.origin).parent / "model_configs"
    return sorted(
        path for path in folder.glob(f"*{_SUFFIX}") if not path.name.endswith("hf_quant_config.json")
    )


def ours(path: Path) -> tuple[int | None, str]:
    """The planner's count, or why there is none."""
    try:
        return parameter_count(load_model(path)), ""
    except SpecError as error:
        fault = error.problems[0]
        return None, fault.found


def theirs(path: Path) -> tuple[int | None, str]:
    """Parameters of the language model that Transformers builds, or why it builds none.

    Of a model that also sees, it is the part that reads and writes text; Transformers has no class of its own for some of these
    with the head, which is then counted by its shape.
    """
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.environ["HF_HUB_OFFLINE"] = "1"
    data = json.loads(path.read_text())
    data.pop("quantization_config", None)  # how weights are stored, not how many there are
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(data))
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            own = "custom code" in str(error)
            kind = data.get("model_type", "?")
            return None, f"`{kind}` needs code of its own repository" if own else f"does not know `{kind}`"
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            try:
                return _parameters(transformers.AutoModelForCausalLM.from_config(text)), ""
            except ValueError:
                found = _parameters(transformers.AutoModel.from_config(text))
                head = 0 if data.get("tie_word_embeddings", False) else text.vocab_size * text.hidden_size
                return found + head, ""
    except (ValueError, TypeError, RuntimeError) as error:
        return None, f"cannot build it ({type(error).__name__})"


def _parameters(model: object) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # type: ignore[attr-defined]


def main() -> int:
    """Counts, writes the page, returns the number of differences."""
    rows, different, equal, alone = [], 0, 0, 0
    for path in configs():
        name = path.name.removesuffix(_SUFFIX).replace("--", "/")
        (mine, mine_why), (other, other_why) = ours(path), theirs(path)
        if mine is not None and other is not None:
            equal += mine == other
            different += mine != other
            said = "equal" if mine == other else f"DIFFERENT: {other:,}"
        elif mine is not None:
            alone += 1
            said = f"Transformers {other_why}"
        else:
            said = f"refused: {mine_why}" + ("" if other is not None else f"; Transformers {other_why}")
        shown = f"{mine:,}" if mine is not None else ""
        rows.append(f"| {name} | {shown} | {said} |")
        print(rows[-1], flush=True)
    text = _PAGE.format(
        files=len(rows), equal=equal, alone=alone, refused=len(rows) - equal - alone - different,
        transformers=version("transformers"), rows="\n".join(rows),
    )  # fmt: skip
    PAGE.write_text(text)
    return different


_PAGE = """# Published configurations

Written by `python benchmarks/configs.py`, whose first lines say how. The wheel aiconfigurator-core 0.12.0 carries {files} files
`config.json` as they were published. Of these,

- {equal} have as many parameters as the model that Transformers {transformers} builds from them on the meta device, to the last,
- {alone} are read although Transformers cannot build them,
- {refused} are refused, because a part of the model is not described yet; the message names it.

Counted is the language model: encoders of pictures and sound are left out, and said to be. `planner models import FILE` reads any
of them.

| configuration | parameters | against Transformers |
|---|---:|---|
{rows}
"""


if __name__ == "__main__":
    raise SystemExit(min(main(), 100))
