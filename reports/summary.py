"""The report for machines and for chat: report.json, whose fields report.schema.json describes, and a page of Markdown."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.records.entities import ExperimentRecord
from reports.sections.paper_tables import PaperTable
from reports.verdicts.comparison import data_of, is_of_training
from reports.verdicts.conclusions import Answer, paper_result
from reports.verdicts.formatting import decimals_for, fixed
from reports.verdicts.ranking import Entry, Ranking, Verdict, measured_again

VERSION = 1


def summary(
    record: ExperimentRecord,
    rankings: tuple[Ranking, ...],
    said: Answer,
    alarms: tuple[str, ...],
    attention: tuple[str, ...],
    tables: tuple[PaperTable, ...],
    conclusions: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    """What report.json holds, but for `previous`. Numbers that are not finite are null."""
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
        "protocols": [
            {
                "fingerprint": ranking.protocol.fingerprint,
                "metric": ranking.protocol.distance,
                "description": ranking.protocol.describe(),
                "checkpoints": len(ranking.entries) + len(ranking.unranked),
                "best": _measured(ranking.best) if ranking.best else None,
            }
            for ranking in rankings
        ],
        "likelihoods": [
            {
                "run": run.name,
                "run_id": run.run_id,
                "step": result.step,
                "data": measured.data,
                "training_set": is_of_training(run, measured),
                "images": measured.images,
                "estimate": measured.strata is not None,
                "protocol": measured.fingerprint,
                "bits_per_dim": _finite(result.bpd),
                "low": _finite(result.low),
                "high": _finite(result.high),
            }
            for run in record.runs
            for measured in run.likelihoods
            for result in measured.results
        ],
        "tables": [
            {
                "title": each.title,
                "columns": [column.title for column in each.table.columns],
                "rows": [list(row.cells) for row in each.table.rows],
                "commands": list(each.missing),
            }
            for each in tables
        ],
        "sweeps": [{"name": name, "conclusions": list(told)} for name, told in conclusions.items()],
    }


def with_previous(facts: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The summary with what the report that it takes the place of said was best. A report of the same records takes over
    what that one had, so that building again changes nothing."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        known = old.get("version") == VERSION and (old["experiment"], old["run"]) == (facts["experiment"], facts["run"])
        if not known:
            return {**facts, "previous": None}
        if {**old, "previous": None} == {**facts, "previous": None}:
            return dict(old)
        return {**facts, "previous": {"updated": old["updated"], "best": old["best"]}}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {**facts, "previous": None}


def since_previous(facts: Mapping[str, Any]) -> str:
    """How the best of this report stands to that of the previous one, in a sentence; empty where there was none."""
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


def markdown(facts: Mapping[str, Any], name: str) -> str:
    """A summary for a pull request or a chat: the headline, what qualifies it, and the best of each protocol, in lines and
    not in a table: their numbers do not compare."""
    lines = [f"**{_plain(facts['headline'])}** ({_plain(facts['experiment'])}, {_plain(name)})", ""]
    lines += [f"- **Alarm:** {_plain(alarm)}" for alarm in facts["alarms"]]
    told = (*facts["sentences"], since_previous(facts), *facts["notes"])
    lines += [f"- {_plain(sentence)}" for sentence in told if sentence]
    lines += [f"- Needs attention: {_plain(sentence)}" for sentence in facts["attention"]]
    lines += [f"- {_plain(told)}" for sweep in facts["sweeps"] for told in sweep["conclusions"]]
    for protocol in facts["protocols"]:
        best = protocol["best"]
        if best is None:
            continue
        digits = decimals_for(best["value"], best["low"], best["high"])
        text = f"Protocol {protocol['fingerprint']}: lowest {protocol['metric']} {fixed(best['value'], digits)}"
        if best["low"] is not None and best["high"] is not None:
            text += f" (95 % interval {fixed(best['low'], digits)} to {fixed(best['high'], digits)})"
        lines.append(f"- {_plain(text)}, step {best['step']:,} of {_plain(best['run'])}")
    return "\n".join(lines) + "\n"


def _best(ranking: Ranking, rankings: tuple[Ranking, ...]) -> dict[str, Any] | None:
    best = ranking.best
    if best is None:
        return None
    again = measured_again(best, rankings)
    protocol = ranking.protocol
    name = protocol.reference if best.run.foreign else best.run.card.name if best.run.card else ""
    reported = paper_result(name, protocol) if protocol.distance.startswith("fid") and data_of(best.run) else None
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


def _measured(entry: Entry) -> dict[str, Any]:
    point = entry.checkpoint
    return {
        "run": entry.run.name,
        "run_id": entry.run.run_id,
        "evaluation_run_id": entry.evaluation.run_id,
        "step": point.step,
        "images_seen": entry.images_seen,
        "value": _finite(point.distance),
        "low": _finite(point.low),
        "high": _finite(point.high),
        "score": _finite(point.score),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")
