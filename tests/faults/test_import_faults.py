"""Faults 3-6, 8 and 26: a bad source or target is one line, exit code 2, and nothing on disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert_torch
from hydrajax.hf import target
from tests.hf_folder import CONFIGS, LLAMA3, TINY, edit, make, replace, save, tensors, tokenizer

pytestmark = pytest.mark.faults
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def no_reference(monkeypatch):
    monkeypatch.setattr(convert_torch.parity, "versions", lambda: None)


@pytest.fixture
def convert(tmp_path, capsys):
    """Run a command that must fail: returns its one line, after checking what stayed behind."""

    def failing(*args) -> str:
        before = snapshot(tmp_path)
        assert convert_torch.main([str(a) for a in args]) == 2
        assert snapshot(tmp_path) == before, "a failed command changed the disk"
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    failing.ok = lambda *args: convert_torch.main([str(a) for a in args]) == 0
    failing.source = lambda folder, *args: failing(
        "import", "--source", folder, "--out", tmp_path / "out", *args
    )
    return failing


def snapshot(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns if p.is_file() else None for p in folder.rglob("*")}


def rewrite(folder: Path, **changes) -> Path:
    """Replace tensors (None removes one) by Hugging Face name, dots written as __."""
    weights = tensors(TINY)
    for name, array in changes.items():
        name = name.replace("__", ".")
        weights.pop(name, None)
        if array is not None:
            weights[name] = array
    (folder / WEIGHTS).unlink()
    save(folder, weights)
    return folder


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-10]),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:100]),
    "empty": lambda p: p.write_bytes(b""),
    "three bytes": lambda p: p.write_bytes(b"abc"),
    "huge header": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()),
    "garbage header": lambda p: p.write_bytes((64).to_bytes(8, "little") + b"\xff" * 64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shard(tmp_path, convert, damage):
    source = make(tmp_path / "hf", shard_bytes=5000)
    shard = sorted(source.glob("*.safetensors"))[1]
    DAMAGE[damage](shard)
    assert f"{shard.name}: not a sound safetensors file" in convert.source(source)


def test_missing_shard(tmp_path, convert):
    source = make(tmp_path / "hf", shard_bytes=5000)
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name}: no such file" in convert.source(source)


def test_index_and_shards_disagree(tmp_path, convert):
    source = make(tmp_path / "hf", shard_bytes=5000)
    index = json.loads((source / INDEX).read_text())
    first = sorted(source.glob("*.safetensors"))[0].name
    good = index["weight_map"]
    for weight_map, words in (
        (good | {"model.phantom.weight": first}, "model.phantom.weight"),
        ({k: v for k, v in good.items() if k != "model.norm.weight"}, "model.norm.weight"),
        ({}, "weight_map: expected an object"),
        (["x"], "weight_map: expected an object"),
        (good | {"model.norm.weight": 7}, "7: no such file"),
    ):
        (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert words in convert.source(source)
    (source / INDEX).write_text("{")
    assert f"{INDEX}: cannot be read as JSON" in convert.source(source)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model__norm__weight": None}, "1 missing tensors: model.norm.weight"),
    ({"model__layers__7__x": np.ones(2, np.float32)}, "does not have: model.layers.7.x"),
    ({"model__norm__weight": np.ones(31, np.float32)},
     "model.norm.weight: expected shape (32,), got (31,)"),
    ({"model__norm__weight": np.ones(32, np.int8)}, "model.norm.weight: dtype I8 is not float32"),
    ({"model__norm__weight": np.ones(32, np.float64)}, "model.norm.weight: dtype F64"),
    ({"model__norm__weight": np.full(32, np.nan, np.float32)}, "32 values are NaN or infinite"),
    ({"model__norm__weight": np.full(32, np.inf, np.float16)}, "32 values are NaN or infinite"),
], ids=["missing", "extra", "shape", "int8", "float64", "nan", "inf"])  # fmt: skip
def test_wrong_tensors(tmp_path, convert, changes, words, monkeypatch):
    odd = {"I8": np.dtype(np.int8), "F64": np.dtype(np.float64)}
    monkeypatch.setattr(target, "DTYPES", target.DTYPES | odd)
    source = rewrite(make(tmp_path / "hf"), **changes)
    error = convert.source(source)
    assert words in error and str(source) in error


def test_value_that_does_not_fit_the_asked_dtype(tmp_path, convert):
    source = rewrite(make(tmp_path / "hf"), model__norm__weight=np.full(32, 1e6, np.float32))
    error = convert.source(source, "--dtype", "float16")
    assert "model.norm.weight" in error and "1e+06 does not fit float16" in error


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/hostname", "a/b", "..", "", "a\\b"])
def test_index_leads_out_of_the_folder(tmp_path, convert, name):
    source = make(tmp_path / "hf")
    (source / WEIGHTS).rename(tmp_path / "evil.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(TINY), name)}))
    error = convert.source(source)
    assert repr(name) in error and "not a plain file name; refused" in error


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
def test_symlink_out_of_the_folder(tmp_path, convert, file):
    source = make(tmp_path / "hf")
    (source / file).rename(tmp_path / "outside")
    (source / file).symlink_to(tmp_path / "outside")
    assert f"{file}: a symlink that leaves the folder" in convert.source(source)


def test_symlinks_of_a_hub_cache_are_fine(tmp_path, convert):
    repo = tmp_path / "models--org--name"
    source = make(repo / "snapshots" / "0123")
    (repo / "blobs").mkdir()
    for path in list(source.iterdir()):
        path.rename(repo / "blobs" / f"blob-{path.name}")
        path.symlink_to(f"../../blobs/blob-{path.name}")
    assert convert.ok("import", "--source", source, "--out", tmp_path / "out")


def test_code_is_neither_run_nor_unpickled(tmp_path, convert):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    import pickle

    source = make(tmp_path / "hf")
    (source / WEIGHTS).unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    assert "pass --allow-pickle" in convert.source(source)
    pytest.importorskip("torch")
    assert "pytorch_model.bin: torch's weights_only" in convert.source(source, "--allow-pickle")
    (source / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    edit(source, auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil")
    assert "model_type 'evil' is not supported" in convert.source(source)
    assert not (tmp_path / "executed").exists()


def test_tied_and_untied_heads(tmp_path, convert, capsys):
    embed = tensors(TINY)["model.embed_tokens.weight"]
    equal = rewrite(make(tmp_path / "equal"), lm_head__weight=embed)
    assert convert.ok("import", "--source", equal, "--out", tmp_path / "a")
    assert "WARNING" not in capsys.readouterr().out
    differs = rewrite(make(tmp_path / "differs"), lm_head__weight=embed + 1)
    assert convert.ok("import", "--source", differs, "--out", tmp_path / "b")
    assert "WARNING: tie_word_embeddings is true but lm_head.weight differs" in (
        capsys.readouterr().out
    )
    tied = [json.loads((tmp_path / out / "config.json").read_text())["model"]["tied_embeddings"]
            for out in "ab"]  # fmt: skip
    assert tied == [True, False]
    absent = edit(make(tmp_path / "absent"), tie_word_embeddings=False)
    assert "lm_head.weight is missing and tie_word_embeddings is false" in convert.source(absent)


CONFIG_FAULTS = {
    "theta": ("llama", {"rope_theta": 5e5}, "rope_theta=500000.0 and rope_parameters.rope_theta="),
    "factor": ("llama_linear", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
               "rope_scaling and rope_parameters disagree in factor"),
    "null scaling": ("llama_llama3", {"rope_scaling": None}, "rope_scaling is null but"),
    "banana": ("llama", {"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}},
               "rope_type 'banana' is not supported; supported: default, linear, llama3, yarn"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0},
                          "rope_parameters": None}, "rope_type 'dynamic'"),
    "mrope": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "mrope_section": [1, 2]}}, "mrope_section"),
    "no factor": ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "needs factor"),
    "window": ("mistral", {"sliding_window": 4096}, "sliding_window=4096 is active"),
    "qwen window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
                              "max_window_layers": 1}, "sliding_window=8 is active"),
    "smollm window": ("smollm3", {"use_sliding_window": True, "sliding_window": 8},
                      "sliding_window=8 is active"),
    "layer types": ("qwen3", {"layer_types": ["sliding_attention"]}, "['sliding_attention']"),
    **{kind: ("llama", {"model_type": kind}, f"model_type '{kind}' is not supported; supported: "
              "llama, qwen2, qwen3, smollm3, mistral")
       for kind in ("gemma3_text", "olmo3", "qwen3_next", "qwen3_5_text", "mixtral")},
    "no type": ("llama", {"model_type": None}, "model_type None"),
    "gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    "text": ("llama", {"hidden_size": "32"}, "hidden_size: expected a positive integer, got '32'"),
    "bool": ("llama", {"hidden_size": True}, "hidden_size: expected a positive integer, got True"),
    "layers": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "eps": ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
    "heads": ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide"),
    "eos": ("llama", {"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
    "tie": ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
    "no-rope": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: expected a list of 4"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_is_refused(tmp_path, convert, fault):
    name, fields, words = CONFIG_FAULTS[fault]
    source = edit(make(tmp_path / "hf", CONFIGS[name]), **fields)
    error = convert.source(source)
    assert words in error and f"{source / 'config.json'}: " in error


def test_absent_mistral_window_counts_as_active(tmp_path, convert):
    source = edit(make(tmp_path / "hf", CONFIGS["mistral"]), remove=("sliding_window",))
    assert "sliding_window=4096 is active" in convert.source(source)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_config_is_not_json(tmp_path, convert, text):
    source = make(tmp_path / "hf")
    (source / "config.json").write_text(text, encoding="latin-1")
    assert "config.json: " in convert.source(source)


def test_folders_that_are_no_model(tmp_path, convert):
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in convert.source(tmp_path / "empty")
    source = make(tmp_path / "hf")
    (source / WEIGHTS).rename(source / "consolidated.safetensors")
    assert "weight files here: consolidated.safetensors" in convert.source(source)
    assert "x.gguf: no such folder" in convert.source("x.gguf")
    assert "not a GGUF file" in convert.source(source / "config.json")


def test_more_tokens_than_embedding_rows(tmp_path, convert):
    source = make(tmp_path / "hf")
    (source / "tokenizer.json").write_text(tokenizer(97))
    error = convert.source(source)
    assert "tokenizer.json" in error and "ids up to 96" in error and "only 96 rows" in error
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in convert.source(source)


def test_broken_student_folder(tmp_path, convert):
    source = make(tmp_path / "hf")
    for fields, words in (
        ({}, "format_version None is not 1"),
        ({"format_version": 1}, "model: expected an object"),
        ({"model": {"family": "gpt"}, "hydra": {}, "plan": {}}, "config.json: "),
        ({"model": {"width": "x"}, "hydra": {}, "plan": {"fa": 3}}, "config.json: "),
    ):
        edit(source, model_type="hydrahead", **fields)
        assert words in convert.source(source)


@pytest.fixture
def run_folder(tmp_path, convert):
    source = make(tmp_path / "hf", replace(TINY, rope=LLAMA3))
    assert convert.ok("import", "--source", source, "--out", tmp_path / "run")
    return tmp_path / "run"


def test_existing_target_is_kept(tmp_path, convert, run_folder, monkeypatch):
    args = ("export", "--run", run_folder, "--out", tmp_path / "out")
    assert convert.ok(*args)
    assert "exists already" in convert(*args)
    written = []

    def full(output):
        written.append(output)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return output.make().tobytes()

    monkeypatch.setattr(target, "_bytes", full)
    assert "No space left on device" in convert(*args, "--overwrite")
    shutil.rmtree(tmp_path / "out")
    assert "nothing was changed" in convert(*args)


def test_target_that_cannot_be_made(tmp_path, convert, run_folder):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file"):
        convert("export", "--run", run_folder, "--out", out, "--overwrite")
    for out in (run_folder, tmp_path):
        error = convert("export", "--run", run_folder, "--out", out, "--overwrite")
        assert "contains the source" in error
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        error = convert("export", "--run", run_folder, "--out", tmp_path / "locked" / "out")
        assert "Permission denied" in error


@pytest.mark.parametrize("command", ["import", "export"])
def test_disk_that_is_really_full(tmp_path, run_folder, command):
    """The kernel refuses writes beyond a file size, to our files and to the checkpoint's alike."""
    code = (
        "import resource, sys, convert_torch as c\n"
        "c.parity.versions = lambda: None\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "sys.exit(c.main(sys.argv[1:]))\n"
    )
    option = {"import": ("--source", tmp_path / "hf"), "export": ("--run", run_folder)}[command]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, command, *map(str, option), "--out", str(tmp_path / "out")],
        env=env, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    # Orbax may grumble about its event loop while the interpreter ends.
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_hub_id_without_network_and_without_leaking_the_token(convert, monkeypatch):
    import huggingface_hub

    def offline(name, **kwargs):
        raise ConnectionError("GET failed, headers: Bearer hf_secret")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    error = convert.source("org/name")
    assert "org/name: no such folder here, and the hub did not give it" in error
    assert "hf_secret" not in error
    assert "not a hub id" in convert.source("no/such/folder")
