"""Every scorer on a planted circuit: heads that matter are found, and no others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from induction import RELAY, STEP_BACK, WRITER, circuit

from hydrajax.config import DataConfig, SelectConfig
from hydrajax.model import bind
from hydrajax.selection.duo import streaming
from hydrajax.selection.scorers import SCORERS, Context, score
from hydrajax.selection.work import Work
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError

CFG = SelectConfig(probes=("recall",), context=64, pairs=8, rows=8, text_rows=4, text_tokens=48)
DATA = DataConfig(synthetic="recall", synthetic_share=1.0, answer_only=True)
# Swapping the value moves what is copied, not where the key stands: the head that looks one step
# back is the same under x and x', and only ablation and the loss can see it.
FOUND = {
    "patch": {RELAY, WRITER},
    "patch_recv": {WRITER},
    "atp": {RELAY, WRITER},
    "retrieval": {WRITER},
    "ablate": {STEP_BACK, RELAY, WRITER},
    "ppl": {STEP_BACK, RELAY, WRITER},
}


@pytest.fixture(scope="module", params=[True, False], ids=["relay", "direct"])
def context(request):
    shape, _, graphdef, params = circuit(request.param)
    model = bind(graphdef, jax.tree.map(jnp.asarray, params))
    log = []
    made = Context(CFG, shape, DATA, lambda: model, lambda: load_tokenizer("bytes"), log=log.append)
    assert made.probes[0].counts() == {"accepted": 8, "wrong": 0, "small_gap": 0}
    return made, request.param


def heads_above(score_LN, floor):
    return {tuple(map(int, head)) for head in np.argwhere(score_LN > floor)}


@pytest.mark.parametrize("scorer", FOUND)
def test_planted_heads_are_found_and_no_others(scorer, context):
    made, relay = context
    got = SCORERS[scorer](made)
    want = FOUND[scorer] - (set() if relay else {RELAY})
    assert got.measured and heads_above(got.score, CFG.ie_floor) == want
    if scorer in ("patch", "patch_recv"):
        assert all(abs(got.score[head] - 1) < 1e-3 for head in want)
    # and the rest is not merely below the floor: it is nothing
    rest = got.score.copy()
    for head in want:
        rest[head] = 0
    assert rest.max() < 1e-4


def test_streaming_attention_is_dense_attention_under_its_mask():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 21, n, 4), "f4") for n in (6, 3, 3))
    segments = np.ones((2, 21), np.int32)
    segments[1, 17:] = 0
    t, s = np.ogrid[:21, :21]
    seen = (t >= s) & ((t - s < 4) | (s < 3)) & (segments[:, None] > 0)
    logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / 2
    weights = jax.nn.softmax(np.where(seen[:, None], logits, -np.inf), axis=-1)
    want = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, 2, axis=2))
    got = streaming(q, k, v, segments, sinks=3, recent=4).reshape(want.shape)
    real = segments > 0
    assert_close("streaming", want[real], got[real], 1e-5)


def test_gates_stay_open_where_the_answer_needs_them(context, monkeypatch):
    made, relay = context
    if relay:
        pytest.skip("one of the two circuits says it")
    monkeypatch.setattr("hydrajax.selection.duo.SINKS", 2)
    monkeypatch.setattr("hydrajax.selection.duo.RECENT", 4)
    got = SCORERS["duo"](replace_cfg(made, duo_steps=150))
    assert got.score[WRITER] > 0.5
    rest = got.score.copy()
    rest[WRITER] = 0
    assert rest.max() < 0.1  # one step back and the copy of oneself are in the window


def test_zero_and_mean_ablation_agree_where_a_head_is_all_there_is(context):
    made, _ = context
    for ablation in ("mean", "zero"):
        got = SCORERS["ablate"](replace_cfg(made, ablation=ablation))
        assert got.score[WRITER] > 0.4  # m goes to 0, halfway to m(x')
    assert not np.allclose(got.score, SCORERS["ablate"](made).score)


def test_general_ability_brings_in_what_patching_cannot_see(context):
    made, _ = context
    alone = score(replace_cfg(made, general="none"))
    fused = score(made)
    assert alone.score[STEP_BACK] == 0 < fused.score[STEP_BACK]
    assert fused.score[WRITER] == fused.score.max()
    assert set(fused.parts) == {"retrieval", "general"}


def test_ppl_without_text_says_what_to_change(context):
    made, _ = context
    with pytest.raises(UserError, match=r"set data\.files, or select\.general=none"):
        score(replace(made, data=DataConfig()))


def test_a_killed_scoring_goes_on(context, tmp_path):
    made, _ = context
    made = replace_cfg(made, rows=4)
    work = Work(tmp_path / "parts", "same teacher and settings")
    first = SCORERS["patch_recv"](keep_probes(replace(made, work=work), made))
    kept = sorted(path.name for path in work.folder.iterdir())
    assert [name.rsplit(".", 2)[0] for name in kept] == ["receivers.0", "receivers.1"]
    (work.folder / kept[1]).unlink()
    seen = []
    again = keep_probes(replace(made, work=Work(work.folder, work.identity)), made)
    model = made.model
    again.work._part = counting(again.work._part, seen)
    assert np.array_equal(SCORERS["patch_recv"](again).score, first.score)
    assert model is again.model and seen == ["receivers.1"]
    other = keep_probes(replace(made, work=Work(work.folder, "another teacher")), made)
    SCORERS["patch_recv"](other)
    assert len(list(work.folder.iterdir())) == 4
    work.clear()
    assert not work.folder.exists()


def counting(part, seen):
    """Note the parts that are measured and not read."""

    def noted(name, measure):
        def told():
            seen.append(name)
            return measure()

        return part(name, told)

    return noted


def replace_cfg(made, **values):
    return keep_probes(replace(made, cfg=replace(made.cfg, **values)), made)


def keep_probes(context, made):
    context.probes, context.model = made.probes, made.model
    return context
