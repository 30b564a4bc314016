"""convert_torch.py end to end: identities, logits, what it says and what it leaves behind."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import convert_torch
from hydrajax.checkpoint import CheckpointStore, load_run, make_lineage, write_config
from hydrajax.config import HydraConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.hf.files import open_weights
from hydrajax.hf.parity import compare
from tests.hf_folder import CONFIGS, DTYPES, TINY, edit, make, save, tensors, tokenizer


@pytest.fixture(autouse=True)
def no_reference(request, monkeypatch):
    """Import compares with transformers where it can; only `torch` tests should pay for that."""
    if "torch" not in request.keywords:
        monkeypatch.setattr(convert_torch.parity, "versions", lambda: None)


def run(*args) -> int:
    return convert_torch.main([str(a) for a in args])


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {k: v.read() for k, v in open_weights(folder, allow_pickle=False).items()}


def assert_same_bits(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].dtype == got[name].dtype, name
        np.testing.assert_array_equal(want[name].view(np.uint8), got[name].view(np.uint8), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_after_import_is_the_identity(tmp_path, name):
    source = make(tmp_path / "hf", CONFIGS[name])
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    assert run("export", "--run", tmp_path / "run", "--out", tmp_path / "back") == 0
    assert_same_bits(weights(source), weights(tmp_path / "back"))
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (source / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_holds_in_every_dtype(tmp_path, dtype):
    source = make(tmp_path / "hf", CONFIGS["qwen3"], dtype, shard_bytes=5000)
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    stored = load_run(tmp_path / "run")
    assert {np.dtype(p.dtype).name for p in stored.params.values()} == {dtype}
    assert run("export", "--run", tmp_path / "run", "--out", tmp_path / "back") == 0
    assert_same_bits(weights(source), weights(tmp_path / "back"))


def test_dtype_option_and_mixed_dtypes(tmp_path):
    source = make(tmp_path / "hf", TINY, "bfloat16")
    mixed = tensors(TINY, "bfloat16") | {"model.norm.weight": np.ones(32, np.float32)}
    (source / "model.safetensors").unlink()
    save(source, mixed)
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    assert run("export", "--run", tmp_path / "run", "--out", tmp_path / "back") == 0
    assert_same_bits(mixed, weights(tmp_path / "back"))
    args = ("--out", tmp_path / "run32", "--dtype", "float32")
    assert run("import", "--source", source, *args) == 0
    want = {k: v.astype(np.float32) for k, v in mixed.items()}
    assert run("export", "--run", tmp_path / "run32", "--out", tmp_path / "back32") == 0
    assert_same_bits(want, weights(tmp_path / "back32"))


def test_import_tells_what_it_did(tmp_path, capsys):
    source = edit(make(tmp_path / "hf"), remove=("max_position_embeddings",), auto_map={"A": "x.B"})
    (source / "x.py").write_text("raise SystemExit('executed')")
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    for words in ("max_position_embeddings=2048", "auto_map", "never run", "equal the source",
                  "torch and transformers are not installed"):  # fmt: skip
        assert words in said
    report = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert report["tensors"] == len(tensors(TINY)) and len(report["sha256"]) == 64
    info = load_run(tmp_path / "run").info
    assert info.hydra == HydraConfig.teacher() and info.plan == HeadPlan.all_full(2, 4, 2)
    assert set(info.lineage["source_sha256"]) >= {"config.json", "model.safetensors"}


def test_export_of_a_hybrid_and_back(tmp_path, capsys):
    cfg, hydra = TINY, HydraConfig()
    plan = HeadPlan(((0, 1), (3,)), 4, 2)
    rng = np.random.default_rng(0)
    shapes = convert_torch.student_shapes(cfg, hydra, plan)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    student = tmp_path / "student"
    student.mkdir()
    with closing(CheckpointStore(student)) as store:
        store.save(7, params=params)
    write_config(student, model=cfg, hydra=hydra, plan=plan, lineage=make_lineage([], None))
    assert run("export", "--run", student, "--out", tmp_path / "out") == 0
    assert "only hydrajax loads it" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "hydrahead"
    assert run("import", "--source", tmp_path / "out", "--out", tmp_path / "again") == 0
    again = load_run(tmp_path / "again")
    assert (again.info.model, again.info.hydra, again.info.plan) == (cfg, hydra, plan)
    assert_same_bits(params, {k: np.asarray(v) for k, v in again.params.items()})


def test_tokenizer_smaller_than_the_embedding_is_fine(tmp_path, capsys):
    source = make(tmp_path / "hf")
    (source / "tokenizer.json").write_text(tokenizer(90))
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    assert "tokenizer 90 of 96 embedding rows" in capsys.readouterr().out


def test_works_with_torch_transformers_and_gguf_absent(tmp_path):
    source = make(tmp_path / "hf")
    code = (
        "import sys\n"
        "absent = ('torch', 'transformers', 'gguf')\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "import convert_torch as c\n"
        f"assert c.main(['import', '--source', {str(source)!r}, '--out', 'run']) == 0\n"
        "assert c.main(['export', '--run', 'run', '--out', 'back']) == 0\n"
        f"assert c.main(['verify', '--run', 'run', '--source', {str(source)!r}]) == 2\n"
        "open('m.gguf', 'wb').write(b'GGUF')\n"
        "assert c.main(['import', '--source', 'm.gguf', '--out', 'g']) == 2\n"
        "assert c.main(['import', '--source', 'org/name', '--out', 'g']) == 2\n"
    )
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "hydrajax[dev]" in errors[0] and "hydrajax[gguf]" in errors[1]
    assert "org/name: no such folder here, and the hub did not give it" in errors[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "m.gguf", "run"]


def test_compare_measures():
    theirs = np.random.default_rng(0).normal(size=(2, 8, 5))
    same = compare(theirs + 3.0, theirs)
    assert same["max_abs_delta_logit"] == pytest.approx(3) and same["top1_agreement"] == 1
    assert abs(same["kl"]) < 1e-12 < compare(-theirs, theirs)["kl"]


def reference(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The same model, made and saved by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from hydrajax.hf.config import write_config as hf_config

    torch.manual_seed(0)
    values = hf_config(CONFIGS[name], dtype)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values), dtype=getattr(torch, dtype)
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.new_empty(param.shape, dtype=torch.float32).normal_(0, 0.3))
    model.save_pretrained(folder)
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(tmp_path, name, capsys):
    source = reference(name, tmp_path / "hf")
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    logits = json.loads((tmp_path / "run" / "parity.json").read_text())["logits"]
    assert logits["max_abs_delta_logit"] <= 1e-4 and logits["max_abs_logit"] > 0.5
    assert logits["top1_agreement"] >= 0.98 and abs(logits["kl"]) < 1e-6
    assert load_run(tmp_path / "run").info.model == CONFIGS[name]
    assert "top-1 agreement" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_loads_the_export(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = reference("llama_llama3", tmp_path / "hf", dtype)
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    assert run("export", "--run", tmp_path / "run", "--out", tmp_path / "back") == 0
    assert_same_bits(weights(source), weights(tmp_path / "back"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype)
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert model.config.rope_parameters["factor"] == 8


@pytest.mark.torch
def test_verify_tells_right_from_wrong(tmp_path, capsys):
    source = reference("llama", tmp_path / "hf")
    assert run("import", "--source", source, "--out", tmp_path / "run") == 0
    assert run("verify", "--run", tmp_path / "run", "--source", source) == 0
    reference("llama_biases", tmp_path / "other")
    assert run("verify", "--run", tmp_path / "run", "--source", tmp_path / "other") == 1
    assert "does NOT compute the source" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert report["logits"]["tokens"] == 128 and report["tensors"]


@pytest.mark.torch
def test_pickle_is_read_on_request(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    source = reference("llama", tmp_path / "hf", "bfloat16")
    want = {k: v.copy() for k, v in weights(source).items()}
    state = {k: torch.from_numpy(v.view(np.int16)).view(torch.bfloat16) for k, v in want.items()}
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    assert run("import", "--source", source, "--out", tmp_path / "run") == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert run("import", "--source", source, "--out", tmp_path / "run", "--allow-pickle") == 0
    assert run("export", "--run", tmp_path / "run", "--out", tmp_path / "back") == 0
    assert_same_bits(want, weights(tmp_path / "back"))
