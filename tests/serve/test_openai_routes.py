"""OpenAI's routes against a running core whose engine does what a script says: forms, streams, errors, sessions, tools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from parrot.protocol.engine import Failed, Finished, Started, TokenLogprob, Tokens
from tests.serve.http_support import WORDS, Cluster, ScriptedEngine, Tokenizers, WordTokenizer, cluster, eventually

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SECRET = "a-secret-of-more-than-twenty-characters"


@pytest.fixture
async def c() -> AsyncIterator[Cluster]:
    async with cluster() as running:
        yield running


def ask(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


async def post(c: Cluster, body: Any, path: str = CHAT, **headers: str) -> tuple[int, Any]:
    return await c.client.send("POST", path, body, headers=headers)


async def events(
    c: Cluster, body: dict[str, Any], path: str = CHAT, then: Callable[[list[Any]], object] | None = None, **headers: str
) -> list[Any]:
    """The data of a stream's events; `then` is called with what has come so far after each."""
    found: list[Any] = []
    async with c.client.http.post(c.client.url + path, json={**body, "stream": True}, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        async for raw in response.content:
            text = raw.decode().strip()
            if text:
                data = text.removeprefix("data: ")
                found.append(data if data == "[DONE]" else msgspec.json.decode(data))
                if then is not None:
                    then(found)
    return found


def said(chunks: list[Any], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        if chunk != "[DONE]"
        for choice in chunk.get("choices", [])
        if choice["index"] == index
    )


def sessions(c: Cluster) -> int:
    return c.server.core.counts()["sessions"]


def prompt(engine: ScriptedEngine, task: int = -1) -> str:
    """The whole prompt of a task that the engine got, as the words of its ids."""
    tokenizer = engine.tokenizers.load(engine.tokenizer)
    return tokenizer.decode([i for fill in engine.tasks[task].chain for i in fill.token_ids or ()])


# -------------------------------------------------------------------------------------------------------- one answer


async def test_a_chat_is_answered_in_openais_form_and_its_session_is_gone(c: Cluster) -> None:
    engine = await c.engine()
    engine.script(Started(2), Finished((1, 2), "fine thanks", "eos", 7, 2))
    status, answer = await post(c, ask())
    assert status == 200
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "fine thanks", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert (answer["object"], answer["model"], answer["id"][:9]) == ("chat.completion", "m", "chatcmpl-")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 2, 9)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert prompt(engine) == "user> hello assistant>"
    assert sessions(c) == 0


async def test_messages_are_segments_of_their_own(c: Cluster) -> None:
    engine = await c.engine()
    turns = [("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("user", "more")]
    await post(c, ask(messages=[{"role": role, "content": content} for role, content in turns]))
    tokenizer = c.tokenizers.load(WORDS)
    found = [tokenizer.decode(fill.token_ids or ()) for fill in engine.tasks[0].chain]
    assert found == ["system> be brief", "user> hello", "assistant>", "hi", "user> more", "assistant>"]


async def test_a_text_is_completed(c: Cluster) -> None:
    engine = await c.engine()
    engine.script(Started(), Finished((1,), "fine", "length", 3))
    status, answer = await post(c, {"model": "m", "prompt": "how are you"}, "/v1/completions")
    assert status == 200
    assert answer["choices"] == [{"index": 0, "text": "fine", "finish_reason": "length", "logprobs": None}]
    assert (answer["object"], answer["id"][:5]) == ("text_completion", "cmpl-")
    assert engine.tasks[0].generate.sampling.max_gen_length == 16
    assert prompt(engine) == "how are you"


async def test_token_ids_reach_the_engine_as_they_are(c: Cluster) -> None:
    engine = await c.engine(bos_tokens=1)
    tokenizer = c.tokenizers.load(WORDS)
    ids = tokenizer.encode("how are you")
    for given in (ids, [0, *ids]):  # the engine's own beginning is there once
        status, answer = await post(c, {"model": "m", "prompt": given, "echo": True}, "/v1/completions")
        assert status == 200
        assert [i for fill in engine.tasks[-1].chain for i in fill.token_ids or ()] == [0, *ids]
        assert answer["choices"][0]["text"] == "how are youfine thanks"
    status, answer = await post(c, {"model": "m", "prompt": [99999]}, "/v1/completions")
    assert (status, answer["error"]["param"]) == (400, "prompt")


async def test_each_prompt_and_each_choice_is_an_answer_and_prompts_count_once(c: Cluster) -> None:
    engine = await c.engine()
    for number in range(4):
        engine.script(Started(number), Finished((1, 1), f"a{number}", "eos", 5, number))
    status, answer = await post(c, {"model": "m", "prompt": ["p", "q"], "n": 2}, "/v1/completions")
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert sorted(choice["text"] for choice in answer["choices"]) == ["a0", "a1", "a2", "a3"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (10, 8)
    assert len({task.task.session_id for task in engine.tasks}) == 1


async def test_choices_share_the_prompts_contexts_and_draw_differently(c: Cluster) -> None:
    engine = await c.engine()
    await post(c, ask(n=3, seed=5))
    chains = [[fill.context_id for fill in task.chain] for task in engine.tasks]
    assert chains[0] == chains[1] == chains[2]
    assert sorted(task.generate.sampling.seed or 0 for task in engine.tasks) == [5, 6, 7]


async def test_sampling_values_reach_the_engine(c: Cluster) -> None:
    engine = await c.engine()
    body = ask(temperature=0.5, top_p=0.9, max_tokens=7, stop=["x", "y"], seed=3, ignore_eos=True, top_k=4, frequency_penalty=1)
    await post(c, body)
    sampling = engine.tasks[0].generate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_gen_length, sampling.stops) == (0.5, 0.9, 7, ("x", "y"))
    assert (sampling.seed, sampling.ignore_tokenizer_eos, sampling.top_k, sampling.frequency_penalty) == (3, True, 4, 1.0)


async def test_without_a_limit_an_answer_may_fill_what_the_prompt_leaves_of_the_context(c: Cluster) -> None:
    engine = await c.engine()  # its longest sequence is 2000 tokens, the prompt 3
    await post(c, ask())
    await post(c, ask(max_completion_tokens=5000))
    assert [task.generate.sampling.max_gen_length for task in engine.tasks] == [1997, 1997]


async def test_a_prompt_that_is_longer_than_the_context_is_refused(c: Cluster) -> None:
    await c.engine()
    for body, path in ((ask("word " * 2001), CHAT), ({"model": "m", "prompt": "word " * 2000}, "/v1/completions")):
        status, answer = await post(c, body, path)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert sessions(c) == 0


async def test_log_probabilities_come_with_the_tokens(c: Cluster) -> None:
    engine = await c.engine()
    first, second = TokenLogprob("fine", -0.1, (("fine", -0.1),)), TokenLogprob(" thanks", -0.2, ((" thanks", -0.2),))
    script = [Started(), Tokens((1,), "fine", logprobs=(first,)), Tokens((2,), "", logprobs=(second,))]
    engine.script(*script, Finished((1, 2), "fine thanks", "eos", 3))
    _, answer = await post(c, ask(logprobs=True, top_logprobs=1))
    shown = answer["choices"][0]["logprobs"]["content"]
    assert [(each["token"], each["logprob"], len(each["top_logprobs"])) for each in shown] == [
        ("fine", -0.1, 1),
        (" thanks", -0.2, 1),
    ]
    engine.script(*script, Finished((1,), "fine", "stop_str", 3))  # the stop string took the second token away
    chunks = await events(c, ask(logprobs=True, top_logprobs=1, stop=" thanks"))
    streamed = [
        each for chunk in chunks[:-1] for choice in chunk["choices"] for each in (choice["logprobs"] or {}).get("content", [])
    ]
    assert [each["token"] for each in streamed] == ["fine"]
    assert engine.tasks[0].generate.sampling.logprobs == 1


# ---------------------------------------------------------------------------------------------------------- streaming


async def test_a_stream_says_the_role_the_text_the_reason_the_usage_and_that_it_is_done(c: Cluster) -> None:
    engine = await c.engine()
    gate = asyncio.Event()
    engine.script(Started(1), Tokens((1,), "fine"), gate, Tokens((2,), " thanks"), Finished((1, 2), "fine thanks", "eos", 3, 1))

    def first_text_opens_the_gate(so_far: list[Any]) -> None:
        if len(so_far) == 2:
            gate.set()

    chunks = await events(c, ask(stream_options={"include_usage": True}), then=first_text_opens_the_gate)
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:3]] == ["fine", " thanks"]
    assert chunks[3]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert chunks[4]["choices"] == []
    assert chunks[4]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert sessions(c) == 0


async def test_choices_stream_side_by_side(c: Cluster) -> None:
    engine = await c.engine()
    for word in ("one", "two"):
        engine.script(Started(), Tokens((1,), word), Finished((1, 2), f"{word} more", "eos", 3))
    chunks = await events(c, ask(n=2))
    assert sorted([said(chunks, 0), said(chunks, 1)]) == ["one more", "two more"]
    reasons = [choice["finish_reason"] for chunk in chunks[:-1] for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["stop", "stop"]


async def test_a_completion_streams_its_text(c: Cluster) -> None:
    engine = await c.engine()
    engine.script(Started(), Tokens((1,), "fine"), Finished((1, 2), "fine thanks", "length", 3))
    chunks = await events(c, {"model": "m", "prompt": "how are you", "echo": True}, "/v1/completions")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "how are youfine thanks"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


async def test_what_fails_before_any_text_is_an_ordinary_refusal_and_later_an_event_of_the_stream(c: Cluster) -> None:
    engine = await c.engine()
    engine.script(Started(), Failed("generation_failed", "it broke"))
    status, answer = await post(c, ask(stream=True))
    assert (status, answer["error"]["code"]) == (500, "generation_failed")
    assert c.client.headers["x-should-retry"] == "false"
    gate = asyncio.Event()
    engine.script(Started(), Tokens((1,), "fine"), gate, Failed("generation_failed", "it broke"))
    reading = asyncio.create_task(events(c, ask()))
    await eventually(lambda: any(s.shown for streams in c.server.links._streams._sessions.values() for s in streams.values()))
    gate.set()
    chunks = await reading
    assert said(chunks) == "fine"
    assert chunks[-1]["error"]["message"] == "it broke"
    assert sessions(c) == 0


async def test_an_attempt_that_broke_goes_on_behind_what_was_streamed(c: Cluster) -> None:
    engine = await c.engine()
    engine.script(Started(), Tokens((1,), "fine"), None)
    engine.script(Started(), Tokens((2,), " thanks"), Finished((1, 2), "fine thanks", "eos", 3))
    chunks = await events(c, ask())
    assert said(chunks) == "fine thanks"
    assert engine.tasks[1].generate.forced_text == "fine"


async def test_a_client_that_goes_away_takes_its_work_along(c: Cluster) -> None:
    engine = await c.engine()
    engine.script(Started(), Tokens((1,), "fine"), asyncio.Event())
    async with c.client.http.post(c.client.url + CHAT, json=ask(stream=True)) as response:
        await response.content.readline()
    await eventually(lambda: engine.aborted and sessions(c) == 0)
    engine.script(Started(), asyncio.Event())
    waiting = asyncio.create_task(post(c, ask()))
    await eventually(lambda: len(engine.tasks) == 2)
    waiting.cancel()
    await eventually(lambda: len(engine.aborted) == 2 and sessions(c) == 0)
    assert c.server.core.counts()["gets"] == 0


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("code", "status", "openai_code"),
    [
        ("content_filtered", 400, "content_filter"),
        ("remote_refused", 502, "remote_refused"),
        ("bad_sampling", 400, "bad_sampling"),
        ("task_too_large", 400, "context_length_exceeded"),
    ],
)
async def test_what_fails_on_the_engine_has_openais_form(c: Cluster, code: str, status: int, openai_code: str) -> None:
    engine = await c.engine()
    engine.script(Started(), Failed(code, "no"))
    found, answer = await post(c, ask())
    assert answer["error"].pop("message").startswith("no")
    assert (found, answer) == (status, {"error": {"type": _type(status), "param": None, "code": openai_code}})


def _type(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


async def test_a_filtered_output_keeps_what_was_said_and_says_why_it_ends(c: Cluster) -> None:
    engine = await c.engine()
    for _ in range(2):
        engine.script(Started(), Tokens((1,), "fine"), Failed("content_filtered", "cut"))
    status, answer = await post(c, ask())
    assert status == 200
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("fine", "content_filter")
    chunks = await events(c, ask())
    assert said(chunks) == "fine"
    assert chunks[-2]["choices"][0]["finish_reason"] == "content_filter"


async def test_an_unknown_model_is_404_and_without_any_engine_a_client_may_try_again(c: Cluster) -> None:
    status, answer = await post(c, ask())
    assert (status, answer["error"]["type"]) == (503, "server_error")
    assert c.client.headers["Retry-After"] == "5"
    await c.engine()
    status, answer = await post(c, ask(model="other"))
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
    assert "m" in answer["error"]["message"]


async def test_a_model_whose_engine_is_gone_is_waited_for(c: Cluster) -> None:
    engine = await c.engine()
    await post(c, ask())
    c.server.links._lose(c.server.links._links[engine.engine_id], "test")
    waiting = asyncio.create_task(post(c, ask()))
    await eventually(lambda: c.server.core.counts()["queue"] == 1)
    await c.client.register(engine, "again")
    assert (await waiting)[0] == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (ask(mystery=1), "unknown_parameter"),
        (ask(messages=[]), "empty_array"),
        (ask(stop=list("abcde")), "array_above_max_length"),
        (ask(max_tokens=-1), "integer_below_min_value"),
        (ask(parrot={"wait": False, "session": 1}, stream=True), "invalid_value"),
    ],
)
async def test_bad_input_is_refused_in_openais_form_and_changes_nothing(c: Cluster, body: Any, code: str) -> None:
    await c.engine()
    status, answer = await post(c, body)
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (400, code, "invalid_request_error")
    assert sessions(c) == 0


async def test_paths_and_methods_that_are_not_there_refuse_in_their_own_form(c: Cluster) -> None:
    status, answer = await c.client.send("GET", CHAT)
    assert (status, answer["error"]["code"], c.client.headers["Allow"]) == (405, "method_not_allowed", "POST")
    assert "type" in answer["error"]
    status, answer = await c.client.send("GET", "/v1/nothing")
    assert (status, set(answer["error"])) == (404, {"code", "message", "details"})


async def test_a_full_queue_says_when_to_come_again() -> None:
    async with cluster(global_scheduler={"max_queue_size": 1}, max_sessions_num=3) as c:
        engine = await c.engine()
        c.server.links._lose(c.server.links._links[engine.engine_id], "test")
        c.server.core.models()
        await c.client.register(engine, "back", tasks_capacity=1)
        engine.script(asyncio.Event())
        tasks = [asyncio.create_task(post(c, ask())) for _ in range(2)]
        await eventually(lambda: c.server.core.counts()["queue"] == 1)
        status, answer = await post(c, ask())
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
        assert int(c.client.headers["Retry-After"]) >= 1
        assert sessions(c) == 2
        assert len(c.server._tokenization._texts._sessions) == 2, "nothing is left of what was refused"
        for task in tasks:
            task.cancel()


# ------------------------------------------------------------------------------------------------------ the extension


async def test_a_call_joins_a_session_reads_its_variables_and_writes_one(c: Cluster) -> None:
    engine = await c.engine()
    session = await c.client.session()
    own = {"session": session["session_id"], "session_auth": session["session_auth"]}
    engine.script(Started(), engine.finished("a long story"))
    _, first = await post(c, ask("write a story", parrot={**own, "output": "story"}))
    assert first["choices"][0]["message"]["content"] == "a long story"
    told = first["parrot"]
    assert (told["session_id"], told["outputs"][0]["var_name"]) == (session["session_id"], "story")
    var_id = told["outputs"][0]["var_id"]
    assert await c.client.get(session, var_id) == (200, {"content": "a long story"})
    engine.script(Started(), engine.finished("short"))
    _, second = await post(c, ask("sum up {{story}} now", parrot={**own, "inputs": {"story": var_id}}))
    assert second["choices"][0]["message"]["content"] == "short"
    assert prompt(engine) == "user> sum up a long story now assistant>"
    _, report = await c.client.send("GET", f"/v1/session/{session['session_id']}", {**session, "calls": True})
    assert [task["reason"] for call in report["reports"] for task in call["tasks"]] == ["eos", "eos"]


async def test_a_call_need_not_wait_and_runs_when_its_variable_is_wanted(c: Cluster) -> None:
    engine = await c.engine()
    session = await c.client.session()
    own = {"session": session["session_id"], "session_auth": session["session_auth"]}
    status, answer = await post(c, ask("write", parrot={**own, "output": "story", "wait": False}))
    assert (status, answer["choices"]) == (200, [])
    assert not engine.tasks
    inputs = {"story": answer["parrot"]["outputs"][0]["var_id"]}
    status, answer = await post(c, ask("sum up {{story}}", parrot={**own, "inputs": inputs}))
    assert status == 200
    assert len(engine.tasks) == 2


async def test_the_criteria_and_the_deadline_of_the_extension_are_the_calls(c: Cluster) -> None:
    engine = await c.engine()
    session = await c.client.session()
    own = {"session": session["session_id"], "session_auth": session["session_auth"]}
    await post(c, ask(parrot={**own, "criteria": "throughput"}))
    await post(c, ask(parrot=own))
    _, report = await c.client.send("GET", f"/v1/session/{session['session_id']}", {**session, "calls": True})
    assert [call["tasks"][0]["criteria"] for call in report["reports"]] == ["throughput", "latency"]
    engine.script(asyncio.Event())
    status, answer = await post(c, ask(parrot={"deadline": 0.05}))
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert c.client.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("extension", "status", "code"),
    [
        ({"session": 5}, 404, "not_found"),
        ({"session_auth": ""}, 401, "unauthorized"),
        ({"session_auth": "wrong"}, 403, "forbidden"),
        ({"inputs": {"story": "v9"}}, 404, "not_found"),
        ({"inputs": {"other": "v0"}}, 400, "invalid_value"),
        ({"criteria": "speed"}, 400, "bad_criteria"),
    ],
)
async def test_an_extension_that_does_not_fit_is_refused(c: Cluster, extension: dict[str, Any], status: int, code: str) -> None:
    await c.engine()
    session = await c.client.session()
    own = {"session": session["session_id"], "session_auth": session["session_auth"], **extension}
    if not own["session_auth"]:
        del own["session_auth"]
    found, answer = await post(c, ask("about {{story}}", parrot=own))
    assert (found, answer["error"]["code"]) == (status, code)
    assert c.server.core.counts()["gets"] == 0


async def test_a_reader_of_a_sessions_call_that_goes_away_ends_it_unless_it_is_a_variable(c: Cluster) -> None:
    engine = await c.engine()
    session = await c.client.session()
    own = {"session": session["session_id"], "session_auth": session["session_auth"]}
    for extension, aborted in (({}, 1), ({"output": "kept"}, 1)):
        engine.script(Started(), asyncio.Event())
        waiting = asyncio.create_task(post(c, ask(parrot={**own, **extension})))
        running = len(engine.tasks)
        await eventually(lambda running=running: len(engine.tasks) > running)
        waiting.cancel()
        await eventually(lambda: c.server.core.counts()["gets"] == 0)
        await eventually(lambda aborted=aborted: len(engine.aborted) == aborted)
    assert c.server.core.counts().get("dispatched", 0) + c.server.core.counts().get("running", 0) == 1


# ------------------------------------------------------------------------------------------------- whose a request is


async def test_requests_of_one_tenant_share_contexts_and_strangers_share_the_system_message_alone(c: Cluster) -> None:
    engine = await c.engine()
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]

    async def contexts(**headers: str) -> list[int]:
        await post(c, ask(messages=turns), **headers)
        return [fill.context_id for fill in engine.tasks[-1].chain]

    first = await contexts()
    stranger = await contexts()
    assert stranger[0] == first[0]
    assert not set(stranger[1:]) & set(first)
    for name in ({"X-Parrot-Tenant": "me"}, {"Authorization": f"Bearer {SECRET}"}):
        mine, again = await contexts(**name), await contexts(**name)
        assert again == mine
        assert not set(mine[1:]) & set(first)
    placeholder = {"Authorization": "Bearer EMPTY"}
    assert not set((await contexts(**placeholder))[1:]) & set((await contexts(**placeholder))[1:])


async def test_a_conversation_without_a_system_message_shares_nothing_with_strangers(c: Cluster) -> None:
    engine = await c.engine()
    for _ in range(2):
        await post(c, ask())
    first, second = ({fill.context_id for fill in task.chain} for task in engine.tasks)
    assert not first & second


async def test_requests_of_a_named_program_are_calls_of_one_session(c: Cluster) -> None:
    engine = await c.engine()
    for _ in range(2):
        assert (await post(c, ask(), **{"X-Parrot-Program": "agent-1"}))[0] == 200
    await post(c, ask(), **{"X-Parrot-Program": "agent-2"})
    ids = [(task.task.session_id, task.task.call) for task in engine.tasks]
    assert ids[0][0] == ids[1][0] != ids[2][0]
    assert [call for _, call in ids] == [0, 1, 0]
    assert sessions(c) == 2


async def test_a_named_program_begins_anew_when_its_session_is_over() -> None:
    async with cluster(session_life_span=0.2) as c:
        engine = await c.engine()
        for _ in range(2):
            assert (await post(c, ask(), **{"X-Parrot-Program": "agent"}))[0] == 200
            await eventually(lambda: sessions(c) == 0)
        assert engine.tasks[0].task.session_id != engine.tasks[1].task.session_id


async def test_where_keys_are_configured_they_alone_say_who_asks() -> None:
    from parrot.serve.keys import hash_of

    async with cluster(tenants={"a": {"api_keys": [hash_of("key-a")]}}) as c:
        await c.engine()
        status, answer = await post(c, ask(), **{"X-Parrot-Tenant": "a"})
        assert (status, answer["error"]["type"]) == (401, "invalid_request_error")
        status, answer = await post(c, ask(), Authorization="Bearer wrong")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/v1/models", "/v1/models/m"):
            assert (await c.client.send("GET", path))[0] == 401
        assert (await post(c, ask(), Authorization="Bearer key-a"))[0] == 200


@pytest.mark.parametrize("header", ["X-Parrot-Tenant", "X-Parrot-Program"])
async def test_a_header_that_is_no_name_is_refused(c: Cluster, header: str) -> None:
    await c.engine()
    status, answer = await post(c, ask(), **{header: "x" * 300})
    assert (status, answer["error"]["param"]) == (400, header)


# ------------------------------------------------------------------------------------------------------------- models


async def test_the_models_answer_satisfies_both_contracts(c: Cluster) -> None:
    await c.engine(model="org/one")
    await c.engine("two", model="two")
    status, answer = await c.client.send("GET", "/v1/models")
    assert status == 200
    assert answer["models"] == [
        {"model_name": "org/one", "tokenizer_name": WORDS},
        {"model_name": "two", "tokenizer_name": WORDS},
    ]
    assert (answer["object"], [card["id"] for card in answer["data"]]) == ("list", ["org/one", "two"])
    for path in ("org/one", "org%2Fone"):
        status, card = await c.client.send("GET", f"/v1/models/{path}")
        assert (status, card["id"], card["object"], card["owned_by"]) == (200, "org/one", "model", "parrot")
        assert card == answer["data"][0]
    status, answer = await c.client.send("GET", "/v1/models/org/three")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


# -------------------------------------------------------------------------------------------------------------- tools


class ToolTokenizer(WordTokenizer):
    chat_template = "tools in <tool_call>"


class ToolTokenizers(Tokenizers):
    def load(self, name: str) -> WordTokenizer:
        return self.loaded.setdefault(name, ToolTokenizer())


async def test_a_models_own_tool_calls_come_back_and_no_part_of_one_is_shown() -> None:
    tokenizers = ToolTokenizers()
    async with cluster(tokenizers.load) as c:
        engine = await c.engine()
        call = 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
        for _ in range(2):
            parts = [Tokens((1,), call[a : a + 5]) for a in range(0, len(call), 5)]
            engine.script(Started(), *parts, Finished((1,) * len(parts), call, "eos", 3))
        _, answer = await post(c, ask(tools=[TOOL]))
        choice = answer["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
        [made] = choice["message"]["tool_calls"]
        assert made["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
        assert tokenizers.loaded[WORDS].decode(engine.tasks[0].chain[0].token_ids or ()) == "TOOL weather user> hello"
        chunks = await events(c, ask(tools=[TOOL]))
        assert said(chunks) == "Let me see."
        [delta] = [d for chunk in chunks[:-1] for ch in chunk["choices"] for d in ch["delta"].get("tool_calls", [])]
        assert (delta["index"], delta["function"]["name"]) == (0, "weather")
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
async def test_what_a_token_engine_cannot_hold_to_is_refused(fields: dict[str, Any], param: str) -> None:
    async with cluster(ToolTokenizers().load) as c:
        await c.engine()
        status, answer = await post(c, ask(tools=[TOOL], **fields))
        assert (status, answer["error"]["param"]) == (400, param)


async def test_a_model_whose_template_knows_no_tools_refuses_them(c: Cluster) -> None:
    await c.engine()
    status, answer = await post(c, ask(tools=[TOOL]))
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "tools", "unsupported_parameter")
    assert (await post(c, ask(tools=[TOOL], tool_choice="none")))[0] == 200


async def test_the_ids_of_an_output_are_an_engine_s_to_give(c: Cluster) -> None:
    await c.engine()
    status, answer = await c.client.send("POST", "/v1/completions", {"model": "m", "prompt": "x", "return_token_ids": True})
    assert (status, answer["error"]["param"]) == (400, "return_token_ids")
