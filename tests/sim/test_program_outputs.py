"""What the model says in a simulated program: a function's, a journal's, or synthetic; and the command that takes it all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from parrot import P
from parrot.configuration import ConfigurationError
from sim.clients import Mode
from sim.network import Constant
from sim.programs.outputs import OutputError
from sim.programs.real import play_instances
from sim.programs.source import Source, read_inputs
from sim.recorder import Recorder
from sim.run import main
from tests.serve.http_support import cluster
from tests.sim.clusters import processes_with, write_files
from tests.sim.program_runs import HEAD, Runner, engines, run, says, told

__all__ = ["run"]

EXAMPLES = Path(__file__).parents[2] / "examples"
TWO = """
@P.semantic_function()
def two(q: P.Input, first: P.Output(P.SamplingConfig(max_gen_length=9)), second: P.Output):
    '''Of {{q}} say {{first}} and {{second}} too'''

"""


def outputs_file(folder: Path, text: str) -> str:
    path = folder / "answers.py"
    path.write_text(text)
    return f"{path}:answer"


def lengths(recorder: Recorder) -> list[int]:
    return [row.output_tokens for row in recorder.calls]


# ------------------------------------------------------------------------------------------------------- a function


def test_a_users_function_gets_what_it_asks_for(run: Runner, tmp_path: Path) -> None:
    spec = outputs_file(
        tmp_path,
        "from tests.sim.program_runs import told\n"
        "def answer(name, output, prompt, inputs, instance, max_gen_length, rng):\n"
        "    told.append((name, output, prompt, inputs, instance, max_gen_length, rng.random() < 1))\n"
        "    return f'{output} text'\n",
    )
    run(TWO + "def main():\n    a, b = two('things')\n    told.append(b.get())\n", count=2, outputs=spec)
    assert told[:3] == [
        ("two", "first", "Of things say ", {"q": "things"}, 0, 9, True),
        ("two", "first", "Of things say ", {"q": "things"}, 1, 9, True),
        ("two", "second", "Of things say first text and ", {"q": "things", "first": "first text"}, 0, 512, True),
    ]
    assert told[-1] == "second text"


def test_a_prompt_has_the_blanks_that_no_token_stands_for(run: Runner) -> None:
    text = '''
        @P.semantic_function(formatter=None)
        def join(a: P.Input, b: P.Input, c: P.Output, d: P.Output):
            """{{a}}\\n{{b}} {{c}}\\n{{d}}"""

        def main():
            c, d = join(ask("x"), "")
            told.append(d.get())
    '''
    prompts: list[str] = []

    def said(name: str, prompt: str) -> str:
        prompts.append(prompt)
        return f"said {len(prompts)}"

    run(text, outputs=says(said))
    assert prompts[1:] == ["said 1\n ", "said 1\n said 2\n"]


def test_a_function_may_give_a_number_of_tokens(run: Runner, tmp_path: Path) -> None:
    spec = outputs_file(tmp_path, "def answer(**given):\n    return 7 if given['instance'] else 10**9\n")
    recorder = run("def main():\n    told.append(ask('x').get())\n", count=2, outputs=spec)
    assert lengths(recorder) == [7, 20]  # in the order in which they ended
    assert sorted(len(text.split()) for text in told) == [7, 20]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def answer(name):\n    raise KeyError(name)\n", r"output 'answer' of 'ask' \(instance 0\) it raised KeyError"),
        ("def answer():\n    return None\n", "it returned None; expected a text"),
    ],
)
def test_a_function_that_fails_ends_the_run_and_is_named(text: str, said: str, run: Runner, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=said):
        run("def main():\n    ask('x').get()\n", outputs=outputs_file(tmp_path, text))


# -------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_lengths_have_the_mean_and_the_spread_that_were_asked_for(run: Runner) -> None:
    program = """
        @P.semantic_function()
        def long(q: P.Input, a: P.Output(P.SamplingConfig(max_gen_length=4000))):
            '''{{q}} {{a}}'''

        async def main():
            await asyncio.gather(*[(await long.ainvoke("x")).aget() for _ in range(100)])
    """
    wide = pd.Series(lengths(run(program, 4, outputs="synthetic:mean=40,cv=0.5", engines=engines(4))))
    assert wide.mean() == pytest.approx(40, rel=0.06)
    assert wide.std() / wide.mean() == pytest.approx(0.5, rel=0.15)
    assert set(lengths(run(program, 1, outputs="synthetic:mean=33,cv=0"))) == {33}


def test_synthetic_lengths_belong_to_the_call_and_not_to_when_it_runs(run: Runner) -> None:
    program = "def main(n):\n    time.sleep({})\n    [ask(str(i)) for i in range(3)][-1].get()\n    ask('last').get()\n"
    inputs = [f"[{n}]" for n in range(5)]
    found = []
    for wait in ("n", "5 - n"):
        recorder = run(program.format(wait), 5, inputs=inputs, outputs="synthetic:mean=8")
        found.append(sorted((row.program, row.call, row.output_tokens) for row in recorder.calls))
    assert found[0] == found[1]
    other = run(program.format("n"), 5, inputs=inputs, outputs="synthetic:mean=8", seed=1)
    assert sorted((row.program, row.call, row.output_tokens) for row in other.calls) != found[0]


def test_output_length_stands_above_what_is_sampled(run: Runner) -> None:
    program = """
        @P.semantic_function()
        def exact(q: P.Input, a: P.Output(P.SamplingConfig(output_length=11, max_gen_length=30))):
            '''{{q}} {{a}}'''

        def main():
            exact("x").get()
    """
    assert lengths(run(program)) == [11]


# --------------------------------------------------------------------------------------------------------- a journal


@P.semantic_function()
def ask(question: P.Input, answer: P.Output(P.SamplingConfig(max_gen_length=20))):  # type: ignore[no-untyped-def,valid-type]
    """Question {{question}} answer {{answer}}"""


def record(path: Path, answers: Sequence[str]) -> list[str]:
    """A journal of a real core, whose engine said `answers`: question 0, question 1, …, each question in the answer before."""
    heard: list[str] = []

    def program() -> None:
        for number in range(len(answers)):
            heard.append(ask(f"{number} {heard[-1] if heard else ''}").get())

    async def serve() -> None:
        async with cluster(journal_path=str(path), journal_mode="record") as running:
            engine = await running.engine()
            for text in answers:
                engine.script(engine.finished(text))
            await asyncio.to_thread(P.VirtualMachine(running.client.url).run, program)

    asyncio.run(serve())
    return heard


REPEAT = """
def main(start=""):
    said = start
    for number in range(3):
        said = ask(f"{number} {said}").get()
        told.append(said)
"""


def test_a_journal_says_again_what_was_said(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    assert record(path, ["red one", "blue", "green and more"]) == ["red one", "blue", "green and more"]
    run(REPEAT, count=2, rate=0.001, outputs=f"journal:{path}")
    assert told == ["red one", "blue", "green and more"] * 2


def test_a_prompt_that_the_journal_does_not_have_gets_an_output_of_the_function(
    run: Runner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.sqlite"
    record(path, ["red one", "blue"])
    run(REPEAT, inputs=['["elsewhere"]'], outputs=f"journal:{path}")
    assert told == ["red one", "blue", "blue"]  # the second prompt is as in the journal
    assert "no output has the prompt of 'ask'" in caplog.text
    with pytest.raises(OutputError, match="no output 0 of function 'two'; it has: ask"):
        run(TWO + "def main():\n    two('x')[0].get()\n", outputs=f"journal:{path}")


def test_a_journal_that_forgets_is_refused(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"

    async def serve() -> None:
        async with cluster(journal_path=str(path)):
            pass

    asyncio.run(serve())
    with pytest.raises(ConfigurationError, match="journal_mode is 'recover'"):
        run(REPEAT, outputs=f"journal:{path}")
    with pytest.raises(ConfigurationError, match="no such journal"):
        run(REPEAT, outputs=f"journal:{tmp_path / 'missing'}")


# ---------------------------------------------------------------------------------------------------- in real time


THREADS = """
        from concurrent.futures import ThreadPoolExecutor

        def main(vm):
            with ThreadPoolExecutor(2) as pool:
                outputs = list(pool.map(ask, ["a", "b"]))
            told.append([output.get() for output in outputs])
            if len(told) > 1:
                raise KeyError("second")
"""
ASYNC = """
        async def main():
            outputs = [await ask.ainvoke(text) for text in "ab"]
            told.append([await outputs[0].aget(), "".join([piece async for piece in outputs[1].stream()])])
            if len(told) > 1:
                raise KeyError("second")
"""


WRAPPED = """
        def wrapped(function):
            return lambda: function()

        @wrapped
""" + ASYNC.removeprefix("\n")


@pytest.mark.parametrize("text", [THREADS, ASYNC, WRAPPED])
def test_on_a_real_core_instances_run_in_threads_and_may_have_some(text: str, run: Runner) -> None:
    program = run.write(text)

    async def serve() -> Recorder:
        recorder = Recorder(Mode.SEMANTIC)
        async with cluster() as running:
            await running.engine()
            given = (Source(f"{program}:main"), read_inputs(None), 2, recorder)
            await play_instances(running.client.url, *given, network=Constant(0.001), clients=1)
        return recorder

    recorder = asyncio.run(serve())
    assert told == [["fine thanks"] * 2] * 2
    assert [(row.state, row.calls, row.gets, row.error) for row in recorder.programs] == [
        ("finished", 2, 2, None),
        ("failed", 2, 2, "KeyError: 'second'"),
    ]
    assert recorder.counts["calls_finished"] == 4


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    core, engine = write_files(tmp_path)
    return ["--core", core, "--engines", f"{engine}:2"]


def tables_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_the_same_seed_writes_the_same_bytes(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "random_agent.py"
    program.write_text(
        HEAD + "import random\n\n"
        "async def main(vm, name):\n"
        "    for _ in range(random.randrange(1, 4)):\n"
        "        await asyncio.sleep(random.expovariate(1.0))\n"
        "        await (await ask.ainvoke(name)).aget()\n"
    )
    (tmp_path / "names.jsonl").write_text('["a"]\n{"name": "b"}\n\n"c"\n')
    written, printed = [], []
    for number, workers in enumerate("121"):
        out = tmp_path / f"out{number}"
        given = ["--program", f"{program}:main", "--inputs", str(tmp_path / "names.jsonl"), "--count", "12", "--rate", "2"]
        given += ["--policy", "parrot,round_robin", "--workers", workers, "--rtt-ms", "7", "--out", str(out)]
        assert main([*flags, *given]) == 0
        written.append(tables_of(out))
        printed.append(capsys.readouterr().out)
    assert written[0] == written[1] == written[2]
    assert printed[0] == printed[1] == printed[2]
    line = json.loads(printed[0].splitlines()[0])
    assert (line["programs"], line["finished"], line["workload"]) == (12, 12, f"{program}:main")


def test_what_a_program_prints_is_no_result(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "loud.py"
    program.write_text(HEAD + "def main():\n    print('hello', ask('x').get() and 'there')\n")
    assert main([*flags, "--program", f"{program}:main", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "hello there" in captured.err


def test_an_emulated_cluster_runs_the_same_graph(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = outputs_file(tmp_path, "def answer(max_gen_length):\n    return max_gen_length\n")  # what emulated engines say
    (tmp_path / "parts.jsonl").write_text('{"parts": 3}\n{"parts": 2}\n')
    given = ["--program", f"{EXAMPLES}/map_reduce.py:main", "--inputs", str(tmp_path / "parts.jsonl"), "--rate", "5"]
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for backend, more in {"sim": ["--outputs", answers], "emulated": ["--rtt-ms", "3"]}.items():
        out = tmp_path / backend
        assert main([*flags, *given, *more, "--backend", backend, "--out", str(out)]) == 0, capsys.readouterr().err
        (folder,) = [path for path in out.iterdir() if path.is_dir()]
        tables[backend] = {n: pd.read_parquet(folder / f"{n}.parquet") for n in ("programs", "calls", "tasks", "gets")}
    keys = ["program", "call", "output"]
    for name, columns in {
        "programs": ["program", "id", "application", "state", "calls", "gets"],
        "calls": [*keys, "name", "state", "output_tokens", "prompt_tokens"],
        "tasks": [*keys, "state", "attempts", "criteria", "depth", "prompt_tokens", "output_tokens"],
        "gets": ["program", "id", "var", "criteria"],
    }.items():
        pd.testing.assert_frame_equal(tables["emulated"][name][columns], tables["sim"][name][columns], obj=name)
    assert processes_with(str(tmp_path)) == []


def test_the_agent_of_the_examples_loops_and_branches(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = outputs_file(
        tmp_path,
        "SAYS = ['COUNT', 'LOOK lamp', 'DONE no: there is none']\n"
        "def answer(inputs, instance):\n"
        "    turn = inputs['notes'].count('Found')\n"
        "    return SAYS[turn] if instance == 0 else 'I do not know.\\nLOOK rope'\n",
    )
    given = ["--program", f"{EXAMPLES}/agent.py:main", "--count", "2", "--outputs", answers]
    assert main([*flags, *given, "--out", str(tmp_path / "out")]) == 0
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    programs = pd.read_parquet(folder / "programs.parquet")
    assert programs["calls"].tolist() == [3, 1]
    assert programs["jct_s"][0] > 2.0 * 4  # three shelves, then one, two seconds each
    assert programs["jct_s"][1] < 2.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--program", "missing.py:main"], "missing.py: no such file"),
        (["--program", "no_such_module:main"], "module 'no_such_module' cannot be found"),
        (["--program", "{good}"], "expected FILE.py:FUNCTION"),
        (["--program", "{good}:absent"], "no function 'absent'; it has: main, more, steps"),
        (["--program", "{good}:more"], "more(x) cannot be called: missing a required argument: 'x'; --inputs"),
        (["--program", "{good}:app", "--inputs", "{many}"], "many.jsonl:1: app() cannot be called: too many"),
        (["--program", "{good}:steps"], "a call of a generator runs nothing"),
        (["--program", "{broken}:main"], "broken.py:2: "),
        (["--program", "{leaving}:main"], "leaving.py:2: it cannot be imported: SystemExit: KEY is not set"),
        (["--program", "{good}:main", "--outputs", "{leaving}:main"], "cannot be imported: SystemExit: KEY is not set"),
        (["--program", "{eager}:main"], "put what runs it under `if __name__"),
        (["--program", "{good}:main", "--inputs", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--program", "{good}:main", "--inputs", "{inputs}"], "inputs.jsonl:2: no JSON"),
        (["--program", "{good}:main", "--inputs", "{many}"], "many.jsonl:1: main() cannot be called: too many"),
        (["--program", "{good}:main", "--outputs", "synthetic:mean=0"], "'mean=0': expected mean=TOKENS"),
        (["--program", "{good}:main", "--outputs", "{good}:more"], "parameter 'x' is none of name, prompt"),
        (["--program", "{good}:main", "--outputs", "{good}:more", "--backend", "emulated"], "say what they say"),
        (["--program", "{good}:main", "--client", "request"], "a program sends what its own code sends"),
        (["--program", "{good}:main", "--arrivals", "recorded", "--rate", "1"], "arrivals recorded: a program has no trace"),
        (["--program", "{good}:main", "--arrivals", "gamma:2"], "arrivals gamma:2: at which --rate?"),
        (["--program", "{good}:main", "--workload", "chat"], "workloads, program: one of the two"),
        (["--workload", "chat", "--outputs", "synthetic"], "inputs and outputs are a program's"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    given: list[str], said: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "good": "def main():\n    pass\n\ndef more(x):\n    pass\n\ndef steps():\n    yield 1\n\n"
        "class App:\n    def __call__(self):\n        pass\n\napp = App()\n",
        "leaving": "import sys\nsys.exit('KEY is not set')\n",
        "broken": "x = 1\ndef main(:\n    pass\n",
        "eager": "from parrot import P\nvm = P.VirtualMachine()\nvm.register_session()\ndef main():\n    pass\n",
    }
    paths: dict[str, Any] = {}
    for name, text in files.items():
        paths[name] = tmp_path / f"{name}.py"
        paths[name].write_text(text)
    for name, text in {"inputs": "[]\n{oops\n", "many": "[1, 2]\n"}.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text(text)
    assert main([*flags, *(text.format(**paths) for text in given), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1
