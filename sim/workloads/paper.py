"""The workloads of the Parrot paper (OSDI'24, arXiv 2405.19888), as its published artifact ran them.

The numbers come from a JSON file that the user names (`paper:gpts,file=PATH`); what is fixed here is shape: which call reads
what. Names: chain_summary, map_reduce, bing_copilot, gpts, mixed, chat. Only `chat` needs no file: ShareGPT's lengths are
not among the paper's data, so they are drawn from log-normal distributions with the means that the vLLM paper (SOSP'23,
section 6.1) gives for that set.

What a user or a document brings is an input (`sets`), what all requests of an application share is constant text, so that
contexts are shared where the artifact could share them. Outputs have the length that the file says.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from parrot.protocol.api import Criteria
from sim.workloads.arrivals import check_rate, poisson, stream
from sim.workloads.azure import lengths_of
from sim.workloads.program import Call, Get, Program, Read, Set, Text, WorkloadError, Write
from sim.workloads.source import parameters_of

Count = Annotated[int, Meta(ge=1)]
Tokens = Annotated[int, Meta(ge=1)]

DEFAULT_RATE = 1.0
DEFAULT_COUNT = 100

CHUNK_TOKENS_PER_SIZE = 340 / 1024  #: the artifact's chunk size counts two more tokens a word: a third of it is text
REDUCE_INSTRUCTION_TOKENS = 35  #: not in the file: "The following is set of summaries … Helpful Answer:"
REFINE_HEAD_TOKENS = 35  #: of the refine instruction, what stands in front of the summary so far
LEAST_CALLS_RATIO = 1.5  #: see `calls_of`
MOST_TOO_LONG = 10_000  #: chats in a row that are left out for their length, after which no other is tried


# ---------------------------------------------------------------------------------------------------------- the file


class Article(msgspec.Struct, frozen=True):
    calls_by_chunk_size: dict[str, Count]


class InstructionTokens(msgspec.Struct, frozen=True):
    map: Tokens
    refine: Tokens


class Summaries(msgspec.Struct, frozen=True):
    articles: dict[str, Article]
    instruction_tokens_approx: InstructionTokens
    output_tokens: tuple[Tokens, ...]


class Copilot(msgspec.Struct, frozen=True):
    prompt_tokens: tuple[Tokens, ...]
    shared_prefix_tokens: Tokens
    figure14_pairs_prompt_output: tuple[tuple[Tokens, Tokens], ...]


class App(msgspec.Struct, frozen=True):
    app_name: str
    prompt_length: Tokens
    query_length: Tokens
    output_length: Tokens


class Gpts(msgspec.Struct, frozen=True):
    apps: Annotated[tuple[App, ...], Meta(min_length=1)]


class Mixed(msgspec.Struct, frozen=True):
    chats: Count
    map_reduce_apps: Count
    map_reduce_gaps_s: tuple[Annotated[float, Meta(ge=0.0)], ...]
    chunk_size: Tokens
    output_tokens: Tokens


class PaperWorkloads(msgspec.Struct, frozen=True):
    """The part of the file that workloads are made from."""

    chain_summary_and_map_reduce: Summaries
    bing_copilot: Copilot
    gpts: Gpts
    mixed: Mixed


def read_paper(path: str | Path) -> PaperWorkloads:
    """The file's parameters. Raises WorkloadError, which names the file and what is wrong in it."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=PaperWorkloads)
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise WorkloadError(f"{path}: not the paper's workloads: {error}") from error


# ------------------------------------------------------------------------------------------------------- parameters


class SummaryParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """chain_summary and map_reduce. article: one of the file's (programs take them in turn when it is left out)."""

    article: str | None = None
    chunk_size: Tokens = 1024
    output_tokens: Tokens = 50


class CopilotParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """output_tokens: of every request; left out: those of figure 14, in their order. share: whether the long prompt that all
    requests begin with is one text, or each request's own."""

    output_tokens: Tokens | None = None
    share: bool = True


class GptsParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """share: as of bing_copilot."""

    share: bool = True


class MixedParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chats at one a second beside map-reduce summaries of the file's first article. lengths: of the chats, as of chat."""

    lengths: str | None = None


class ChatParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question, one answer. Log-normal with these means and relative standard deviations; or, with `lengths`, as long as
    a request drawn from that Azure trace."""

    prompt_tokens: Tokens = 161
    output_tokens: Tokens = 338
    prompt_spread: Annotated[float, Meta(ge=0.0, le=5.0)] = 1.2
    output_spread: Annotated[float, Meta(ge=0.0, le=5.0)] = 0.9
    most_prompt_tokens: Tokens = 1024  #: the artifact leaves out longer prompts, and pairs above `most_tokens`
    most_tokens: Tokens = 2048
    lengths: str | None = None


# ---------------------------------------------------------------------------------------------------------- programs


def chunk_tokens(chunk_size: int) -> int:
    """Real tokens of a chunk of the artifact's `chunk_size`."""
    return max(1, round(chunk_size * CHUNK_TOKENS_PER_SIZE))


def calls_of(article: Article, chunk_size: int) -> int:
    """Chunks of an article. The file's counts are inferred from one measurement each; calls × chunk size hardly differs
    between an article's chunk sizes, so a count that is off from the median of that by more than LEAST_CALLS_RATIO came
    from a measurement gone wrong, and the median's is taken, as for a chunk size that the file does not list."""
    counts = {int(size): count for size, count in article.calls_by_chunk_size.items()}
    expected = statistics.median(size * count for size, count in counts.items()) / chunk_size
    listed = counts.get(chunk_size)
    if listed is not None and expected / LEAST_CALLS_RATIO <= listed <= expected * LEAST_CALLS_RATIO:
        return listed
    return max(1, round(expected))


def chain_summary(name: str, arrival_s: float, article: str, file: PaperWorkloads, p: SummaryParameters) -> Program:
    """Chunk by chunk: each call refines the summary so far. The last one is fetched."""
    part = file.chain_summary_and_map_reduce
    instruction, size = part.instruction_tokens_approx, chunk_tokens(p.chunk_size)
    chunks = calls_of(part.articles[article], p.chunk_size)
    calls = [_call("map", Text("paper/first", instruction.map), Read("chunk0"), _write("summary0", p.output_tokens))]
    head = min(REFINE_HEAD_TOKENS, instruction.refine - 1)
    for i in range(1, chunks):
        calls.append(
            _call(
                "refine",
                Text("paper/refine/head", head),
                Read(f"summary{i - 1}"),
                Read(f"chunk{i}"),
                Text("paper/refine/rest", instruction.refine - head),
                _write(f"summary{i}", p.output_tokens),
            )
        )
    sets = tuple(Set(f"chunk{i}", f"{article}/{p.chunk_size}/{i}", size) for i in range(chunks))
    get = Get("last", f"summary{chunks - 1}", Criteria.THROUGHPUT)
    return Program(name, arrival_s, tuple(calls), (get,), sets, application="chain_summary")


def map_reduce(name: str, arrival_s: float, article: str, file: PaperWorkloads, p: SummaryParameters) -> Program:
    """Every chunk on its own, then one call over all summaries, which is fetched."""
    part = file.chain_summary_and_map_reduce
    chunks = calls_of(part.articles[article], p.chunk_size)
    instruction = Text("paper/map", part.instruction_tokens_approx.map)
    calls = [_call("map", instruction, Read(f"chunk{i}"), _write(f"part{i}", p.output_tokens)) for i in range(chunks)]
    parts = [Read(f"part{i}") for i in range(chunks)]
    calls.append(_call("reduce", Text("paper/reduce", REDUCE_INSTRUCTION_TOKENS), *parts, _write("summary", p.output_tokens)))
    sets = tuple(Set(f"chunk{i}", f"{article}/{p.chunk_size}/{i}", chunk_tokens(p.chunk_size)) for i in range(chunks))
    return Program(name, arrival_s, tuple(calls), (Get("last", "summary"),), sets, application="map_reduce")


def request(name: str, arrival_s: float, prefix: tuple[str, int], own: int, output: int, application: str) -> Program:
    """One call: a prefix (key, tokens; 0: none) and an input of its own."""
    segments = [Text(*prefix)] if prefix[1] else []
    call = _call(application, *segments, Read("query"), _write("answer", output))
    query = Set("query", f"{name}/query", own)
    return Program(name, arrival_s, (call,), (Get("answer", "answer"),), (query,), application=application)


def _call(name: str, *segments: Any) -> Call:
    return Call(segments=segments, name=name)


def _write(var: str, tokens: int) -> Write:
    return Write(var, tokens, max_gen_length=tokens)


def _log_normal(generator: np.random.Generator, mean: float, spread: float) -> int:
    variance = np.log1p(spread * spread)
    return max(4, round(float(generator.lognormal(np.log(mean) - variance / 2, np.sqrt(variance)))))


def _chat_lengths(p: ChatParameters, generator: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Prompt and output tokens of chats, without end. As the artifact does, what is too long is left out, not cut."""
    recorded = [] if p.lengths is None else [pair for pair in lengths_of(p.lengths) if _short_enough(pair, p)]
    if p.lengths is not None and not recorded:
        raise WorkloadError(f"{p.lengths}: no request of at most {p.most_prompt_tokens} prompt tokens, {p.most_tokens} in all")
    too_long = 0
    while True:
        if recorded:
            yield recorded[int(generator.integers(len(recorded)))]
            continue
        prompt = _log_normal(generator, p.prompt_tokens, p.prompt_spread)
        pair = (prompt, _log_normal(generator, p.output_tokens, p.output_spread))
        if _short_enough(pair, p):
            too_long = 0
            yield pair
        elif (too_long := too_long + 1) == MOST_TOO_LONG:
            raise WorkloadError(
                f"workload paper:chat: {too_long} chats in a row were longer than most_prompt_tokens={p.most_prompt_tokens} or "
                f"most_tokens={p.most_tokens}; raise these, or lower prompt_tokens and output_tokens"
            )


def _short_enough(pair: tuple[int, int], p: ChatParameters) -> bool:
    return pair[0] <= p.most_prompt_tokens and sum(pair) <= p.most_tokens


# --------------------------------------------------------------------------------------------------------- generators


def _summaries(
    build: Callable[..., Program], file: PaperWorkloads, p: SummaryParameters, arrivals: Iterator[float], seed: int
) -> Iterator[Program]:
    names = list(file.chain_summary_and_map_reduce.articles) if p.article is None else [p.article]
    for index, (name, arrival_s) in enumerate(zip(itertools.cycle(names), arrivals, strict=False)):
        yield build(f"{build.__name__}{index}", arrival_s, name, file, p)


def _copilot(file: PaperWorkloads, p: CopilotParameters, arrivals: Iterator[float], seed: int) -> Iterator[Program]:
    part = file.bing_copilot
    outputs = [output for _, output in part.figure14_pairs_prompt_output] if p.output_tokens is None else [p.output_tokens]
    pairs = zip(itertools.cycle(part.prompt_tokens), itertools.cycle(outputs), strict=False)
    for index, ((prompt, output), arrival_s) in enumerate(zip(pairs, arrivals, strict=False)):
        name, shared = f"copilot{index}", min(part.shared_prefix_tokens, prompt - 1)
        key = "paper/copilot" if p.share else f"{name}/copilot"
        yield request(name, arrival_s, (key, shared), prompt - shared, output, "bing_copilot")


def _gpts(file: PaperWorkloads, p: GptsParameters, arrivals: Iterator[float], seed: int) -> Iterator[Program]:
    """Each application as often as the others: the artifact ignores the percentages."""
    draw = stream(seed, "paper.gpts")
    for index, arrival_s in enumerate(arrivals):
        app = file.gpts.apps[int(draw.integers(len(file.gpts.apps)))]
        name = f"gpts{index}"
        key = f"paper/gpts/{app.app_name}" if p.share else f"{name}/prompt"
        yield request(name, arrival_s, (key, app.prompt_length), app.query_length, app.output_length, app.app_name)


def _chat(file: PaperWorkloads | None, p: ChatParameters, arrivals: Iterator[float], seed: int) -> Iterator[Program]:
    lengths = _chat_lengths(p, stream(seed, "paper.chat"))
    for index, (arrival_s, (prompt, output)) in enumerate(zip(arrivals, lengths, strict=False)):
        yield request(f"chat{index}", arrival_s, ("", 0), prompt, output, "chat")


def _mixed(file: PaperWorkloads, p: MixedParameters, arrivals: Iterator[float], seed: int) -> Iterator[Program]:
    part = file.mixed
    article = next(iter(file.chain_summary_and_map_reduce.articles))
    times = itertools.accumulate(part.map_reduce_gaps_s[: part.map_reduce_apps - 1], initial=0.0)
    summary = SummaryParameters(article, part.chunk_size, part.output_tokens)
    programs = [map_reduce(f"map_reduce{i}", at, article, file, summary) for i, at in enumerate(times)]
    programs += itertools.islice(
        _chat(file, ChatParameters(lengths=p.lengths), map(float, itertools.count()), seed), part.chats
    )
    return iter(sorted(programs, key=lambda program: program.arrival_s))


_NAMES: dict[str, tuple[type[Any], Callable[..., Iterator[Program]]]] = {
    "chain_summary": (SummaryParameters, lambda *a: _summaries(chain_summary, *a)),
    "map_reduce": (SummaryParameters, lambda *a: _summaries(map_reduce, *a)),
    "bing_copilot": (CopilotParameters, _copilot),
    "gpts": (GptsParameters, _gpts),
    "mixed": (MixedParameters, _mixed),
    "chat": (ChatParameters, _chat),
}


def open_paper(rest: str, *, rate: float | None, seed: int, count: int | None) -> Iterator[Program]:
    """The programs of `rest`: NAME[,file=PATH][,parameter=value…], with Poisson arrivals at `rate` programs per second (1
    when it is left out), `count` of them (100). `mixed` has the arrivals of the paper and all its programs.

    Raises WorkloadError for what is wrong with the name, a parameter or the file.
    """
    name, *items = [item.strip() for item in rest.split(",")]
    if name not in _NAMES:
        raise WorkloadError(f"workload paper:{name}: no such workload of the paper; it has: {', '.join(_NAMES)}")
    where, options = f"workload paper:{name}", {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise WorkloadError(f"{where}: {item!r} is no parameter=value")
        options[key.strip()] = value.strip()
    path = options.pop("file", None)
    kind, generate = _NAMES[name]
    parameters = parameters_of(f"paper:{name}", kind, options)
    if path is None and name != "chat":
        raise WorkloadError(f"{where}: its lengths come from a file; name it: paper:{name},file=PATH")
    file = None if path is None else read_paper(path)
    if isinstance(parameters, SummaryParameters) and file is not None and parameters.article is not None:
        known_articles = file.chain_summary_and_map_reduce.articles
        if parameters.article not in known_articles:
            raise WorkloadError(f"{where}: {path} has no article {parameters.article!r}; it has: {', '.join(known_articles)}")
    if name == "mixed":
        if rate is not None:
            raise WorkloadError(f"{where}: its arrivals are the paper's; leave the rate out")
        return itertools.islice(generate(file, parameters, iter(()), seed), count)
    arrivals = poisson(DEFAULT_RATE if rate is None else check_rate(rate), stream(seed, "arrivals"))
    return itertools.islice(generate(file, parameters, arrivals, seed), DEFAULT_COUNT if count is None else count)
