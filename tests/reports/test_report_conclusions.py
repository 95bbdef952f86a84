"""Sentences follow from numbers: rankings, the comparison with the paper, and a sweep's conclusion."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from support.report_experiments import DIGITS, FEWER, FID

from ddpm_core.protocol import Protocol
from ddpm_core.verdicts import Verdict
from reports.records.entities import (
    CheckpointRecord,
    DataCard,
    EvaluationRecord,
    ExperimentRecord,
    RunRecord,
    SweepRecord,
    TrialRecord,
)
from reports.verdicts import paper
from reports.verdicts.comparison import compare_with_paper
from reports.verdicts.conclusions import answer
from reports.verdicts.ranking import Entry, rank
from reports.verdicts.sweeps import SweepAnalysis, analyse

CIFAR10 = DataCard(name="CIFAR-10", images=50_000, shape=(32, 32, 3))


def point(step: int, distance: float, half: float | None = 1.0) -> CheckpointRecord:
    if half is None:
        return CheckpointRecord(step=step, distance=distance)
    return CheckpointRecord(step=step, distance=distance, low=distance - half, high=distance + half)


def run(name: str, *points: CheckpointRecord, protocol: Protocol = DIGITS, card: DataCard | None = None) -> RunRecord:
    evaluation = EvaluationRecord(run_id=f"e-{name}", status="FINISHED", protocol=protocol, checkpoints=points)
    return RunRecord(
        run_id=name,
        name=name,
        status="FINISHED",
        params={},
        tags={},
        latest={},
        card=card,
        evaluations=(evaluation,),
    )


def record(*runs: RunRecord) -> ExperimentRecord:
    return ExperimentRecord(name="x", experiment_id="1", tracking_uri="sqlite:///x.db", runs=runs)


def entry(distance: float, card: DataCard | None, protocol: Protocol = FID) -> Entry:
    trained = run("a", point(1, distance), protocol=protocol, card=card)
    return Entry(run=trained, evaluation=trained.evaluations[0], checkpoint=trained.evaluations[0].checkpoints[0])


def sweep_of(*runs: RunRecord, failed: tuple[str, ...] = ()) -> SweepAnalysis:
    trials = [
        TrialRecord(
            label=r.name, point=r.name, run_id=r.run_id, evaluation_run_id=f"e-{r.name}", steps=1,
            status="failed" if r.name in failed else "finished", prior_bpd=None,
        )
        for r in runs
    ]  # fmt: skip
    return analyse(SweepRecord(run_id="s", name="s", trials=tuple(trials)), record(*runs))


def conclusion(*runs: RunRecord) -> str:
    (ranking,) = sweep_of(*runs).rankings
    return ranking.conclusion


def test_a_ranking_never_holds_two_protocols() -> None:
    rankings = rank([run("a", point(1, 5.0)), run("b", point(1, 1.0), protocol=FEWER), run("c", point(1, 4.0))])
    assert [[e.run.name for e in r.entries] for r in rankings] == [["c", "a"], ["b"]]
    for ranking in rankings:
        assert {e.evaluation.protocol for e in ranking.entries} == {ranking.protocol}


def test_every_field_of_the_protocol_separates() -> None:
    changed: dict[str, Any] = {
        "sampler": "ddim",
        "spacing": "quadratic",
        "weights": "raw",
        "precision": "bfloat16",
        "purpose": "report",
        "against": "test",
        "var_type": "fixedsmall",
        "ema_length": 0.1,
    }
    names = {field.name for field in fields(Protocol)} - {"rounding"}
    for name in names - changed.keys():
        value = getattr(DIGITS, name)
        changed[name] = value + "x" if isinstance(value, str) else not value if value is True else value + 1
    runs = [run(name, point(1, 1.0), protocol=replace(DIGITS, **{name: changed[name]})) for name in names]
    assert len(rank(runs)) == len(names)


def test_a_checkpoint_measured_again_is_reported_on_those_samples() -> None:
    chosen = run("a", point(1, 5.0, 0.5), point(2, 4.0, 0.5))
    again = EvaluationRecord(
        run_id="e-again",
        status="FINISHED",
        protocol=replace(DIGITS, purpose="report"),
        checkpoints=(point(2, 4.5, 0.5),),
    )
    said = answer(record(chosen), rank([chosen]))
    assert "optimistic" in " ".join(said.notes)
    both = replace(chosen, evaluations=(*chosen.evaluations, again))
    said = answer(record(both), rank([both]))
    assert said.headline.startswith("Step 2 has the lowest fd_digits, 4.0")
    text = " ".join(said.sentences)
    assert re.search(
        r"On samples that it was not chosen by, it has fd_digits 4\.50*\. 95.% interval: 4\.00* to 5\.00*\.", text
    )
    assert "optimistic" not in " ".join(said.notes)
    other = replace(chosen, evaluations=(*chosen.evaluations, replace(again, checkpoints=(point(1, 4.5),))))
    assert "not chosen by" not in " ".join(answer(record(other), rank([other])).sentences)  # of another checkpoint


def test_fid_leads_then_the_most_samples() -> None:
    runs = [
        run("a", point(1, 1.0), protocol=FEWER),
        run("b", point(1, 1.0)),
        run("c", point(1, 9.0), protocol=FID),
    ]
    assert [r.protocol for r in rank(runs)] == [FID, DIGITS, FEWER]


def test_a_checkpoint_measured_twice_counts_as_measured_last() -> None:
    twice = run("a", point(1, 5.0))
    again = replace(twice.evaluations[0], run_id="later", started=1, checkpoints=(point(1, 6.0),))
    (ranking,) = rank([replace(twice, evaluations=(again, *twice.evaluations))])
    assert [e.checkpoint.distance for e in ranking.entries] == [6.0]


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (point(2, 11.9), Verdict.INDISTINGUISHABLE),
        (point(2, 12.0), Verdict.INDISTINGUISHABLE),  # the ends touch
        (point(2, 12.1), Verdict.HIGHER),
        (point(2, 10.5, half=None), Verdict.NO_INTERVAL),
        (point(2, float("nan")), Verdict.NOT_FINITE),
    ],
)
def test_the_verdict_follows_from_the_intervals(other: CheckpointRecord, verdict: Verdict) -> None:
    (ranking,) = rank([run("a", point(1, 10.0), other)])
    rest = [e for e in (*ranking.entries, *ranking.unranked) if e is not ranking.best]
    assert [ranking.verdict(e) for e in rest] == [verdict]


def test_without_an_interval_the_best_is_not_called_distinguishable() -> None:
    text = " ".join(answer(record(a := run("a", point(1, 1.0, half=None), point(2, 2.0))), rank([a])).sentences)
    assert "Its interval is not measured." in text
    assert "can be told apart from it is not known" in text


@pytest.mark.parametrize(
    ("name", "shape", "reported"),
    [
        ("cifar10", (32, 32, 3), "3.17 for CIFAR-10 (Table 1"),
        ("CIFAR-10 train", (32, 32, 3), "3.17 for CIFAR-10 (Table 1"),
        ("lsun_church", (256, 256, 3), "7.89 for LSUN Church (Table 3)"),
        ("church_outdoor_train", (256, 256, 3), "7.89 for LSUN Church (Table 3)"),
        ("lsun-bedroom", (256, 256, 3), "6.36 for LSUN Bedroom (Table 3)"),
        ("lsun_cat", (256, 256, 3), "19.75 for LSUN Cat (Table 3)"),
    ],
)
def test_the_papers_number_is_that_of_the_data_set(name: str, shape: tuple[int, ...], reported: str) -> None:
    card = DataCard(name=name, shape=shape)
    protocol = replace(FID, reference="train")
    text = compare_with_paper(entry(20.0, card, protocol))
    assert f"The paper reports {reported}" in text
    assert "not measured as" not in text


@pytest.mark.parametrize("name", ["cifar100", "celebahq256", "digits", "caterpillars"])
def test_a_data_set_the_paper_has_no_fid_of_is_compared_with_nothing(name: str) -> None:
    assert compare_with_paper(entry(3.0, DataCard(name=name))) == (
        f"The paper reports no FID for {name}, so there is nothing to compare this one with."
    )


def test_a_distance_on_other_features_is_never_compared() -> None:
    text = compare_with_paper(entry(3.0, CIFAR10, DIGITS))
    assert "not comparable" in text
    assert "3.17" not in text


def test_the_test_set_has_its_own_number_in_the_paper() -> None:
    text = compare_with_paper(entry(5.0, CIFAR10, replace(FID, reference="cifar10-test", reference_images=10_000)))
    assert "5.24 for CIFAR-10 (section 4.1, against the test set); this is 0.2 lower." in text


def test_every_departure_from_the_papers_protocol_is_told() -> None:
    protocol = replace(
        FID, num_samples=10_000, sampler="ddim", sampler_steps=50, weights="raw", reference_images=10_000
    )
    text = compare_with_paper(entry(8.0, replace(CIFAR10, shape=(16, 16, 3)), protocol))
    assert text.endswith(
        "It was not measured as the paper's was: 10,000 samples instead of 50,000, "
        "10,000 reference images instead of 50,000, 50 ddim steps instead of 1,000 ancestral ones, "
        "raw weights instead of their moving average and 16 × 16 pixels instead of 32 × 32."
    )


def test_a_sweep_says_which_trials_it_tells_apart() -> None:
    assert conclusion(run("linear", point(1, 9.0)), run("quad", point(1, 12.0))) == (
        "By fd_digits: linear 9 is better than quad 12 at 95 % confidence. quad is 3 above linear (95 % interval 1.59 to "
        "4.41, of the samples' noise alone: each was trained with one seed)"
    )
    text = conclusion(
        run("a", point(1, 9.0)), run("b", point(1, 9.5)), run("c", point(1, 10.0)), run("d", point(1, 20.0))
    )
    assert "a 9, b 9.5 and c 10, but their intervals overlap, so this sweep cannot say which is best" in text
    unknown = conclusion(run("a", point(1, 9.0)), run("b", point(1, 10.0, half=None)))
    assert unknown.endswith("but no interval says whether that is more than noise")


def test_a_trial_counts_by_its_last_checkpoint_not_its_luckiest() -> None:
    text = conclusion(run("a", point(1, 1.0), point(2, 9.0)), run("b", point(1, 8.0), point(2, 5.0)))
    assert text.startswith("By fd_digits: b 5 is better than a 9")


def test_a_sweep_at_different_steps_says_that_it_compares_more() -> None:
    assert "measured at different steps (1 to 2)" in conclusion(run("a", point(1, 9.0)), run("b", point(2, 20.0)))


def test_a_sweep_never_compares_across_protocols() -> None:
    result = sweep_of(run("a", point(1, 9.0)), run("b", point(1, 1.0), protocol=FEWER))
    assert [len(ranking.results) for ranking in result.rankings] == [1, 1]
    assert all("nothing to compare it with" in ranking.conclusion for ranking in result.rankings)


def test_a_failed_trial_is_shown_as_failed_even_with_a_result() -> None:
    result = sweep_of(run("a", point(1, 9.0)), run("b", point(1, 1.0)), failed=("b",))
    assert [(trial.label, reason) for trial, reason in result.without] == [("b", "failed")]
    assert [r.trial.label for r in result.rankings[0].results] == ["a"]


def test_a_trial_without_a_finite_result_is_not_ranked() -> None:
    result = sweep_of(run("a", point(1, float("inf"))), run("b"))
    assert [reason for _, reason in result.without] == [
        "measured as infinite",
        "not measured: its evaluation has no result yet",
    ]


def test_the_papers_tables_agree_with_each_other_and_its_text() -> None:
    ours = {row.model: row for row in paper.TABLE_1 if row.is_ddpm}
    simple, fixed = ours["DDPM (L_simple)"], ours["DDPM (L, fixed isotropic Σ)"]
    ablation = {(row.mean_type, row.loss_type, row.learned_variance): row for row in paper.TABLE_2}
    assert ablation["eps", "mse", False].fid == simple.fid == paper.CIFAR10.fid == 3.17
    assert ablation["eps", "kl", False].fid == fixed.fid == 13.51
    assert ablation["eps", "mse", False].inception_score == simple.inception_score == 9.46
    assert ablation["xprev", "mse", False].fid is None
    assert ablation["eps", "kl", True].fid is None
    table_3 = {row.model: row for row in paper.TABLE_3}["DDPM (L_simple)"]
    reported = (paper.LSUN_BEDROOM.fid, paper.LSUN_CHURCH.fid, paper.LSUN_CAT.fid)
    assert (table_3.bedroom, table_3.church, table_3.cat) == reported
    assert round(paper.TABLE_4[0].rate, 2) == paper.CIFAR10_RATE
    assert round(paper.TABLE_4[0].rmse, 2) == paper.CIFAR10_RMSE
    assert simple.nll == pytest.approx(paper.CIFAR10_RATE + paper.CIFAR10_DISTORTION)
    assert [row.steps_sent for row in paper.TABLE_4] == list(range(1000, 0, -100))
    assert sorted(paper.TABLE_4, key=lambda row: row.rmse) == sorted(paper.TABLE_4, key=lambda row: -row.rate)
    assert (len(paper.TABLE_1), len(paper.TABLE_2), len(paper.TABLE_3)) == (16, 6, 5)
