"""What training costs, and what tiny-wan's students learn."""

from __future__ import annotations

from benchmarks.results import Record
from benchmarks.tables.cells import MODELS, by_name
from benchmarks.targets import GPU

_STUDENTS = {
    "teacher": "teacher",
    "rcm": "rCM student",
    "merged": "rCM student + (SLA tuning − teacher)",
    "rcm-sla": "SLA tuning, then rCM's forward term",
}
"""Weights of tiny-wan that the table has, in its order."""
_GUIDE = (
    ("clips", (1,),
     "4,096 of the teacher's, fifty guided steps each, 128 at once; stopped, the same command goes "
     "on"),
    ("first `rcm`", (2,),
     "four steps by consistency alone: every step is the student's"),
    ("second `rcm`", (3,),
     "from there by both terms: every fifth step is the student's, the others the fake score's"),
    ("`sla`", (4,),
     "the teacher and its companion, the student, take turns"),
    ("`run`, `generate`", (5, 6),
     "100 evaluations of the network a clip become 4"),
)  # fmt: skip
"""What the training guide's commands do, and their numbers."""
_DENSE_STUDENTS = {"dense": "dense", "jvp": "dense, forward mode"}
"""By a word in the names of their records."""
_SCORED = ("teacher", "consistency", "rcm", "closed-form", "sla", "merged", "rcm-sla")


def training() -> str:
    """Tokens a second of tuning, by GPUs."""
    lines = [
        "| model | training | blocks | GPUs | sharing a clip | tokens/s | share of bf16 products "
        "| peak a GPU |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    records = by_name("training.json").values()
    rows = sorted(_speed(record) for record in records if record.name.endswith("/tokens_per_s"))
    return "\n".join([*lines, *(line for *_, line in rows)])


def _speed(record: Record) -> tuple[str, str, str, int, int, str]:
    """What a row is sorted by, and the row."""
    _, model, job, gpus, _ = record.name.split("/")
    (_, command, *words), said = job.split("-"), record.config["job"]
    student = [_DENSE_STUDENTS[word] for word in words if word in _DENSE_STUDENTS]
    what = ", ".join([f"`calibrate {command}`", *student])
    blocks = "compiled" if said.get("compile") else "as written"
    count, together = int(gpus.removesuffix("-gpus")), said["context_parallel"]
    share = record.share_of_ceiling
    spread = f" ± {record.spread:,.0f}" if record.runs > 1 else ", one reading"
    line = (
        f"| {MODELS.get(model, model)} | {what} | {blocks} | {count} | {together} | "
        f"{record.value:,.0f}{spread} | {'' if share is None else f'{share:.2f}'} | "
        f"{record.config['peak_gib']:.1f} GiB |"
    )
    return model, what, blocks, count, together, line


def guide() -> str:
    """The commands of the training guide and what each took, as it was run."""
    record = by_name("training_guide.json")[f"{GPU}/tiny-wan/training_guide_minutes"]
    lines = ["| | minutes on an H200 | |", "| --- | ---: | --- |"]
    for title, numbers, what in _GUIDE:
        minutes = sum(record.config["minutes"][number - 1] for number in numbers)
        lines.append(f"| {title} | {minutes:.1f} | {what} |")
    captions, right = record.config["captions"], 100 * record.quality["all_right"]
    result = f"{right:.1f} % of {captions} held-out clips have all attributes right"
    lines.append(f"| all | {record.value:.1f} | {result} |")
    return "\n".join(lines)


def students() -> str:
    """tiny-wan's teacher, its students in few steps, and those that are sparse or in 8 bits."""
    lines = [
        "| weights | evaluations a clip | attention | linear layers | all four right |",
        "| --- | ---: | --- | --- | ---: |",
    ]
    records = filter(_is_told, by_name("tiny_wan_students.json").values())
    for record in sorted(records, key=_student_order):
        config = record.config
        sparse = "dense" if config["topk"] is None else f"sparse, topk {config['topk']:g}"
        lines.append(
            f"| {_STUDENTS[_weights(record)]} | {config['evaluations']} | {sparse} | "
            f"{config['scheme'] or '16 bits'} | {100 * record.value:.1f} % |"
        )
    return "\n".join(lines)


def scores() -> str:
    """Everything that was measured of tiny-wan's clips, the untuned and the unguided included."""
    lines = [
        "| | evaluations | colour | shape | motion | all right | diversity | Fréchet |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    records = sorted(by_name("tiny_wan_students.json").values(), key=_score_order)
    for record in records:
        shares = [record.quality[name] for name in ("colour", "shape", "motion")] + [record.value]
        cells = [
            _spoken(record),
            str(record.config["evaluations"]),
            *(f"{100 * share:.1f} %" for share in shares),
            f"{record.quality['diversity']:.2f}",
            f"{record.quality['frechet']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spoken(record: Record) -> str:
    config = record.config
    steps = "1 step" if config["steps"] == 1 else f"{config['steps']} steps"
    parts = [_weights(record), f"{steps}, guided" if config["guided"] else steps]
    if config["topk"] is not None:
        parts.append(f"topk {config['topk']:g}" + ("" if config["tuned"] else ", untuned"))
    if config["scheme"]:
        parts.append(config["scheme"])
    return ", ".join(parts)


def _score_order(record: Record) -> tuple[int, bool, int, float, bool, str]:
    config, weights = record.config, _weights(record)
    return (
        list(_SCORED).index(weights),
        not config["guided"],
        -config["steps"],
        config["topk"] or 0.0,
        config["tuned"],
        config["scheme"] or "",
    )


def _weights(record: Record) -> str:
    """Whose they are; `student` stands for the better of the two that are distilled."""
    weights = record.config["weights"]
    return record.config["student"] if weights == "student" else weights


def _is_told(record: Record) -> bool:
    """The teacher as its users sample it, rCM's students, and what is sparse and tuned for it."""
    config, weights = record.config, _weights(record)
    if weights == "teacher":
        return config["guided"] and config["steps"] == 50 and config["topk"] is None
    return weights in _STUDENTS and config["tuned"]


def _student_order(record: Record) -> tuple[int, int, float, str]:
    config = record.config
    place = list(_STUDENTS).index(_weights(record))
    return place, -config["steps"], config["topk"] or 0.0, config["scheme"] or ""
