"""The sections of a report from its results: which figures, which tables, in which order."""

from __future__ import annotations

import pandas as pd

from sinklens.decompose.page import CAPTIONS as DECOMPOSED
from sinklens.find.score_figures import layer_profile
from sinklens.mixing.page import CAPTIONS as MIXED
from sinklens.report import story
from sinklens.report.content import Plot, Section, Sheet
from sinklens.report.stages import KINDS, STAGES, Material
from sinklens.trace.figures import share_bars
from sinklens.trace.page import CAPTION as TRACED, CIRCUIT, NEURONS

MOST_ROWS = 40  # of a table on the page; the files have all
DRAWN_SEQUENCES = 6
DRAWN_TOKENS = 160  # of the map of one sequence


def sections(m: Material) -> list[Section]:
    """All sections that tell results."""
    return [_where(m), _writers(m), _key_or_value(m), _breaks(m), _mixing(m)]


def code_of(m: Material, *names: str) -> str:
    """The lines of some stages."""
    return "\n".join(stage.code(m) for stage in STAGES if stage.name in names and stage.name in m.results)


def _missing(m: Material, *names: str) -> list[str]:
    doing = {stage.name: stage.doing for stage in STAGES}
    return [f"Left out ({doing[name]}): {m.refused[name]}." for name in names if name in m.refused]


def _where(m: Material) -> Section:
    scores, sinks = m["scores"], m["sinks"]
    plots = [
        Plot(
            "where-heads", scores.plot(),
            "Each cell is one head: the mean attention on the first token. Bright rows are layers that park attention.",
            "scores.plot()", 420,
        ),
        Plot(
            "where-layers", layer_profile(scores),
            "Bars: share of heads above the threshold. Line: mean attention. Sinks usually begin a few layers in.",
            "layer_profile(scores)",
        ),
        Plot(
            "where-positions", scores.plot_positions(0, columns=DRAWN_TOKENS),
            "The first sequence, all layers, mean over heads. A bright column is a sink; one that begins late or ends "
            "early is a secondary sink. Hover for the token.",
            f"scores.plot_positions(0, columns={DRAWN_TOKENS})", 640,
        ),
    ]  # fmt: skip
    sheets = [Sheet("layers", scores.layer_table(), "Sink rate and mean attention on the first token, by layer.")]
    if len(sinks):
        count = min(DRAWN_SEQUENCES, len(m.tokens))
        width = int(m.tokens.lengths.max())
        drawn = sinks.cut(range(count), width)
        if len(drawn):
            plots.append(
                Plot(
                    "where-lives",
                    drawn.plot(),
                    f"A row is a sink of the first {count} sequence(s), named sequence:position and token; a column is "
                    "a layer. Primary sinks live as long as the strongest lasting one; secondary ones begin or "
                    "end elsewhere.",
                    f"sinks.cut(range({count}), {width}).plot()",
                    560,
                )
            )
        plots.append(
            Plot(
                "where-threshold", sinks.plot_sweep(),
                "Counts depend on the activity threshold and have no plateau: read any count with this curve.",
                "sinks.plot_sweep()",
            )
        )  # fmt: skip
        sheets += [
            Sheet("sinks", sinks.to_dataframe(), "Every sink, its kind with the reason, its layers, its mass."),
            Sheet("levels", sinks.levels(), "How many sinks begin where and live how long."),
            Sheet("threshold", sinks.sweep(), "The counts against the threshold."),
        ]
    return Section(
        "where",
        "Where the sinks are",
        story.where(m),
        plots,
        sheets,
        _missing(m, "scores", "sinks"),
        code_of(m, "scores", "sinks"),
    )


def _writers(m: Material) -> Section:
    trace, neurons = m["trace"], m["neurons"]
    plots: list[Plot] = []
    sheets: list[Sheet] = []
    if trace is not None and trace.traced:
        kinds = [kind for kind in KINDS if any(one.kind == kind for one in trace.traced)]
        first = next((one.sink for one in trace.traced if one.kind == "secondary"), trace.traced[0].sink)
        more = ", neurons=neurons" if neurons is not None else ""
        plots += [
            Plot(
                "writers-shares", share_bars(trace),
                "What each component adds of the sinks' stream along the primary's direction: mean over the phases in "
                "which it writes before the layer where the sink is strongest (in each phase all shares sum to 1). "
                "Whiskers: 95 % intervals over documents.",
                "share_bars(trace)", 560,
            ),
            Plot(
                "writers-circuit", trace.plot_circuit(first, neurons=neurons, scores=m["scores"]), CIRCUIT,
                f"trace.plot_circuit({first}{more}, scores=scores)", 760,
            ),
            Plot("writers-one", trace.plot(first), TRACED, f"trace.plot({first})", 700),
        ]  # fmt: skip
        by = [trace.by_component(kind).assign(kind=kind) for kind in kinds]
        sheets += [
            Sheet(
                "writers_by_component", pd.concat(by, ignore_index=True),
                "In how many phases a component is a writer (a share of at least 0.25), its mean share, and in how "
                "many replacing its output proves it.",
            ),
            Sheet("writers", trace.writers(), "Every writer of every phase, with what its replacement does."),
            Sheet("erasers", trace.erasers(), "Components that take the sink away again."),
        ]  # fmt: skip
        if neurons is not None and len(neurons.writers):
            number = _neurons_of(m, first)
            plots.append(Plot("writers-neurons", neurons.plot(number), NEURONS, f"neurons.plot({number})"))
            sheets.append(Sheet("neurons", neurons.neurons, "The largest neurons of the writers."))
    return Section(
        "writers", "Who writes them", story.writers(m), plots, sheets, _missing(m, "trace", "neurons"),
        code_of(m, "trace", *(["neurons"] if neurons is not None else [])),
    )  # fmt: skip


def _neurons_of(m: Material, sink: int) -> int:
    """The number of the writer of a sink among those split into neurons; the first where it was not."""
    one = m["trace"].phases(sink)[0]
    for number, row in enumerate(m["neurons"].writers.to_dict("records")):
        if (row["sequence"], row["position"]) == (one.sequence, one.position):
            return number
    return 0


def _key_or_value(m: Material) -> Section:
    found = m["decomposition"]
    plots: list[Plot] = []
    sheets: list[Sheet] = []
    if found is not None:
        for kind in found.kinds:
            if len(found.heads(kind)) and len(found.component_table("key", kind)):
                plots += [
                    Plot(
                        f"key-gap-{kind}", found.plot("gap", kind=kind), DECOMPOSED["gap"],
                        f'decomposition.plot("gap", kind="{kind}")', 760,
                    ),
                    Plot(
                        f"key-components-{kind}", found.plot("components", kind=kind), DECOMPOSED["components"],
                        f'decomposition.plot("components", kind="{kind}")', 700,
                    ),
                ]  # fmt: skip
                sheets.append(
                    Sheet(f"means_{kind}", found.means(kind), f"Every number of the {kind} sinks: mean over sinks.")
                )
        if found.effects:
            plots.insert(0, Plot("key-parts", found.plot("parts"), DECOMPOSED["parts"], 'decomposition.plot("parts")'))
            sheets.insert(0, Sheet("parts", found.effects["all"].to_dataframe(), "The 2x2 of all heads at once."))
        if found.claims is not None:
            claims = found.claims.to_dataframe()
            sheets.insert(0, Sheet("claims", claims, "Four claims about what the sinks do, each with its own test."))
    missing = _missing(m, "decomposition")
    sentences = story.key_or_value(m)
    if found is not None:
        sentences += [f"{note[0].upper()}{note[1:].rstrip('.')}." for note in found.notes]
    return Section(
        "key-or-value", "What they do: key or value", sentences, plots, sheets, missing, code_of(m, "decomposition")
    )


def _breaks(m: Material) -> Section:
    found = m["experiment"]
    plots: list[Plot] = []
    sheets: list[Sheet] = []
    sentences = story.breaks(m)
    if found is not None:
        caption = (
            "Filled: an edit of the sinks. Hollow, below it: the same edit at tokens that are no sink. Whiskers: 95 % "
            "intervals over documents; one that crosses the dotted line says that no change can be told."
        )
        for metric in found.metrics:
            plots.append(
                Plot(f"breaks-{metric}", found.plot(metric), caption, f'experiment.plot("{metric}")', 560)
            )  # fmt: skip
        sheets = [
            Sheet("effects", found.to_dataframe(), "Every edit and control: means over sequences, 95 % intervals."),
            Sheet("side_effects", found.side_effects(), "Where the freed attention went, and what else changed."),
        ]
        sentences += [f"{note[0].upper()}{note[1:].rstrip('.')}." for note in found.notes]
    return Section(
        "breaks", "What breaks without them", sentences, plots, sheets, _missing(m, "experiment"),
        code_of(m, "experiment"),
    )  # fmt: skip


def _mixing(m: Material) -> Section:
    found = m["mixing"]
    plots: list[Plot] = []
    sheets: list[Sheet] = []
    sentences = story.mixing(m)
    if found is not None:
        plots = [
            Plot("mixing-indices", found.plot(), MIXED["indices"], "mixing.plot()", 860),
            Plot("mixing-map", found["base"].plot_map(), MIXED["map"], 'mixing["base"].plot_map()', 560),
        ]
        sheets = [
            Sheet("mixing_last", found.to_dataframe(layers=[-1]), "The three indices at the last layer."),
            Sheet("mixing", found.to_dataframe(), "The three indices at every layer."),
        ]
        losses = m.facts["mixing"].get("losses", {})
        if losses:
            table = pd.DataFrame({"condition": list(losses), "loss": list(losses.values())})
            sheets.insert(1, Sheet("mixing_losses", table, "What each condition costs, nats per token."))
        sentences.append(f"Here J is {next(iter(found.conditions.values())).info['definition']}.")
    return Section(
        "mixing", "How mixing changes", sentences, plots, sheets, _missing(m, "mixing"), code_of(m, "mixing")
    )
