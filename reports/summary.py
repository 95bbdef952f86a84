"""The report for machines and for chat: report.json, whose fields report.schema.json describes, and a page of Markdown."""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_core.records import IMAGES_SEEN
from ddpm_core.verdicts import Verdict
from reports.formatting import decimals_for, fixed
from reports.records.entities import BitsPerDim, ExperimentRecord, LikelihoodRecord, RunRecord
from reports.sections.paper_tables import PaperTable
from reports.verdicts.comparison import data_name, data_of, is_of_training, paper_result
from reports.verdicts.conclusions import Answer
from reports.verdicts.ranking import Entry, Ranking, measured_again

VERSION = 1
Facts = dict[str, Any]  # values of report.schema.json


def summarise(
    record: ExperimentRecord,
    rankings: tuple[Ranking, ...],
    said: Answer,
    *,
    alarms: Sequence[str],
    attention: Sequence[str],
    tables: Sequence[PaperTable],
    conclusions: Mapping[str, Sequence[str]],
) -> Facts:
    """What report.json holds, but for `previous`. conclusions: of sweeps, by name. Numbers that are not finite are null."""
    return {
        "version": VERSION,
        "experiment": record.name,
        "run": record.only,
        "updated": record.updated.isoformat() if record.updated else None,
        "headline": said.headline,
        "sentences": list(said.sentences),
        "notes": list(said.notes),
        "alarms": list(alarms),
        "attention": list(attention),
        "best": _best(rankings[0], rankings) if rankings else None,
        "protocols": [_protocol(ranking) for ranking in rankings],
        "likelihoods": [
            _likelihood(run, likelihood, result)
            for run in record.runs
            for likelihood in run.likelihoods
            for result in likelihood.results
        ],
        "tables": [_table(table) for table in tables],
        "sweeps": [{"name": name, "conclusions": list(texts)} for name, texts in conclusions.items()],
    }


def _best(ranking: Ranking, rankings: tuple[Ranking, ...]) -> Facts | None:
    """The best checkpoint of the leading protocol, and what qualifies it."""
    best = ranking.best
    if best is None:
        return None
    protocol, again = ranking.protocol, measured_again(best, rankings)
    comparable = protocol.distance.startswith("fid") and data_of(best.run) is not None
    reported = paper_result(data_name(best) or "", protocol) if comparable else None
    return {
        **_measured(best),
        "metric": protocol.distance,
        "protocol": protocol.fingerprint,
        "indistinguishable": [
            {"run": entry.run.name, "run_id": entry.run.run_id, "step": entry.checkpoint.step}
            for entry in ranking.entries
            if ranking.verdict(entry) is Verdict.INDISTINGUISHABLE
        ],
        "fresh_samples": _measured(again) if again else None,
        "paper": {"value": reported.fid, "place": reported.place} if reported else None,
    }


def _measured(entry: Entry) -> Facts:
    point = entry.checkpoint
    return {
        "run": entry.run.name,
        "run_id": entry.run.run_id,
        "evaluation_run_id": entry.evaluation.run_id,
        "step": point.step,
        IMAGES_SEEN: entry.images_seen,
        "value": _finite(point.distance),
        "low": _finite(point.low),
        "high": _finite(point.high),
        "score": _finite(point.score),
    }


def _protocol(ranking: Ranking) -> Facts:
    return {
        "fingerprint": ranking.protocol.fingerprint,
        "metric": ranking.protocol.distance,
        "description": ranking.protocol.describe(),
        "checkpoints": len(ranking.entries) + len(ranking.unranked),
        "best": _measured(ranking.best) if ranking.best else None,
    }


def _likelihood(run: RunRecord, likelihood: LikelihoodRecord, result: BitsPerDim) -> Facts:
    return {
        "run": run.name,
        "run_id": run.run_id,
        "step": result.step,
        "data": likelihood.data,
        "training_set": is_of_training(run, likelihood),
        "images": likelihood.images,
        "estimate": likelihood.strata is not None,
        "protocol": likelihood.fingerprint,
        "bits_per_dim": _finite(result.bpd),
        "low": _finite(result.low),
        "high": _finite(result.high),
    }


def _table(table: PaperTable) -> Facts:
    return {
        "title": table.title,
        "columns": [column.title for column in table.table.columns],
        "rows": [list(row.cells) for row in table.table.rows],
        "commands": list(table.missing),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def with_previous(facts: Facts, path: Path) -> Facts:
    """The summary with what the report whose place it takes, at `path`, named the best. A report of the same records takes
    over what that one had, so that building again changes nothing."""
    previous = None
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        old = json.loads(path.read_text(encoding="utf-8"))
        if old.get("version") == VERSION and (old["experiment"], old["run"]) == (facts["experiment"], facts["run"]):
            if {**old, "previous": None} == {**facts, "previous": None}:
                return dict(old)
            previous = {"updated": old["updated"], "best": old["best"]}
    return {**facts, "previous": previous}


def since_previous(facts: Facts) -> str:
    """How the best of this report stands to that of the previous one, in a sentence; empty if there was none."""
    previous, best = facts["previous"], facts["best"]
    if not previous or not previous["best"]:
        return ""
    old = previous["best"]
    when = f"In the previous report ({str(previous['updated'])[:16].replace('T', ' ')} UTC)"
    where = f"step {old['step']:,} of {old['run']} was best"
    if best is None or old["protocol"] != best["protocol"]:
        return f"{when} {where}, by another protocol: the two numbers do not compare."
    if (old["run_id"], old["step"]) == (best["run_id"], best["step"]):
        same = "with the same value" if old["value"] == best["value"] else f"then measured as {old['value']:.4g}"
        return f"{when} the same checkpoint was best, {same}."
    digits = decimals_for(best["value"], best["low"], best["high"])
    change = best["value"] - old["value"]
    side = "lower" if change < 0 else "higher"
    return f"{when} {where} with {fixed(old['value'], digits)}: this is {fixed(abs(change), digits)} {side}."


def markdown(facts: Facts, name: str) -> str:
    """A summary for a pull request or a chat: the headline, what qualifies it, and the best of each protocol, in lines and
    not in a table: their numbers do not compare. name: of the report's file."""
    lines = [f"**{_plain(facts['headline'])}** ({_plain(facts['experiment'])}, {_plain(name)})", ""]
    lines += [f"- **Alarm:** {_plain(alarm)}" for alarm in facts["alarms"]]
    qualifications = (*facts["sentences"], since_previous(facts), *facts["notes"])
    lines += [f"- {_plain(sentence)}" for sentence in qualifications if sentence]
    lines += [f"- Needs attention: {_plain(sentence)}" for sentence in facts["attention"]]
    lines += [f"- {_plain(text)}" for sweep in facts["sweeps"] for text in sweep["conclusions"]]
    lines += [_best_line(protocol, protocol["best"]) for protocol in facts["protocols"] if protocol["best"]]
    return "\n".join(lines) + "\n"


def _best_line(protocol: Facts, best: Facts) -> str:
    digits = decimals_for(best["value"], best["low"], best["high"])
    text = f"Protocol {protocol['fingerprint']}: lowest {protocol['metric']} {fixed(best['value'], digits)}"
    if best["low"] is not None and best["high"] is not None:
        text += f" (95 % interval {fixed(best['low'], digits)} to {fixed(best['high'], digits)})"
    return f"- {_plain(text)}, step {best['step']:,} of {_plain(best['run'])}"


def _plain(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")
