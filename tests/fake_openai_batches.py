"""Files and batches of the OpenAI on 127.0.0.1: a batch is validated, worked off in the background, and ends as its fate has it.

Fates: completed; expired:F and cancelled:F (a share F is done; an expired batch lists the others as errors, a cancelled one nowhere); failed;
errors (every line failed, 500); no_output (completed, without any file); limit (failed: too many tokens wait already); refused (never
created); hasty (completed a while before it names its files).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fake_openai import Call, FakeOpenAI

ENDED = ("failed", "completed", "expired", "cancelled")
STEPS = 20  # looks that a batch takes at the clock while it works


class Refused(Exception):
    """A request that is answered with this status and error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, kind: str | None = "invalid_request_error", **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """One page of a list, as every list of this API is told."""
    names = [item["id"] for item in items]
    start = names.index(query["after"]) + 1 if query.get("after") in names else 0
    found = items[start : start + min(100, int(query.get("limit", 20)))]
    ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {"first_id": None, "last_id": None}
    return {"object": "list", "data": found, "has_more": start + len(found) < len(items)} | ends


class Batches:
    """What was uploaded, and what became of it."""

    def __init__(self, server: FakeOpenAI) -> None:
        self.server = server
        self.files: dict[str, tuple[dict[str, Any], bytes]] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.waiting: Counter[str] = Counter()  # tokens by batch
        self.ended_parts: Counter[str] = Counter()  # batches of one content that were worked off
        self.calls = 0

    def counts(self) -> dict[str, Any]:
        return {
            "files": sum(facts["purpose"] == "batch" for facts, _ in self.files.values()),
            "batches": dict(Counter(batch["status"] for batch in self.made.values())),
            "same_batches": sum(n - 1 for n in self.ended_parts.values()),
        }

    def route(self, call: Call) -> None:
        self.calls += 1
        options = self.server.options
        kinds = ("server_error", "unavailable", "limited", "drop", "cut", "cut", "truncated")
        drawn = random.Random(f"{options.seed}/{self.calls}").random()
        fault = kinds[int(drawn / options.batch_faults * len(kinds))] if drawn < options.batch_faults else ""
        if fault == "drop":
            return call.connection.close()
        if fault:
            self.server.kinds[f"{call.path.split('/')[2]} {fault}"] += 1
        if fault in ("server_error", "unavailable", "limited"):
            raise Refused({"server_error": 500, "unavailable": 503, "limited": 429}[fault], "Try again later.", kind="server_error", retry_after="0.01")
        wait = options.batch_latency + (options.create_latency if (call.method, call.path) == ("POST", "/v1/batches") else 0.0)
        self.server.loop.call_later(wait / 2, self.act, call, fault, wait / 2)
        return None

    def act(self, call: Call, fault: str, wait: float) -> None:
        try:
            made, status, headers = self.answer(call), 200, {}
        except Refused as refused:
            made, status, headers = refused.body, refused.status, refused.headers
        if isinstance(made, bytes):
            headers = {"content-type": "application/octet-stream"}
        content = made if isinstance(made, bytes) else json.dumps(made).encode()  # as it is now
        self.server.loop.call_later(wait, lambda: call.reply(status, content, headers, cut=fault))

    def answer(self, call: Call) -> Any:
        _, kind, name, action, *_ = [*call.path.strip("/").split("/"), "", "", ""]
        if kind == "files":
            if call.method == "POST" and not name:
                return self.upload(call)
            if call.method == "GET" and not name:
                return page([facts for facts, _ in self.files.values() if facts["purpose"] == call.query.get("purpose", facts["purpose"])][::-1], call.query)
            if name not in self.files:
                raise Refused(404, f"No such File object: {name}", None, "id")
            if call.method == "DELETE":
                del self.files[name]
                return {"id": name, "object": "file", "deleted": True}
            return self.files[name][1] if action == "content" else self.files[name][0]
        if not name:
            return self.create(json.loads(call.body)) if call.method == "POST" else page([*self.made.values()][::-1], call.query)
        if name not in self.made:
            raise Refused(404, f"No batch found with id '{name}'.", None, "batch_id")
        batch = self.made[name]
        if action == "cancel" and call.method == "POST":
            if batch["status"] in ENDED:
                raise Refused(409, f"Cannot cancel a batch with status '{batch['status']}'.")
            batch |= {"status": "cancelling", "cancelling_at": int(time.time())}
        return batch

    def upload(self, call: Call) -> dict[str, Any]:
        boundary = re.search(r'boundary="?([^";]+)', call.headers.get("content-type", ""))
        if not boundary:
            raise Refused(400, "Could not parse multipart form")
        given: dict[str, tuple[str, bytes]] = {}
        for part in (b"\r\n" + call.body).split(b"\r\n--" + boundary[1].encode())[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            found = re.search(r'name="([^"]*)"(?:; filename="([^"]*)")?', head.decode())
            assert found
            given[found[1]] = found[2] or "", content
        if "file" not in given or "purpose" not in given:
            raise Refused(400, "Missing required parameter: 'file' or 'purpose'.", "missing_required_parameter")
        purpose, (filename, content) = given["purpose"][1].decode(), given["file"]
        if purpose == "batch" and len(content) > self.server.options.max_bytes:
            raise Refused(400, "File is too large.")
        return self.keep(content, purpose, filename)

    def keep(self, content: bytes, purpose: str, filename: str) -> dict[str, Any]:
        name = f"file-{self.server.number()}"
        facts = {"id": name, "object": "file", "bytes": len(content), "created_at": int(time.time()), "filename": filename, "purpose": purpose, "status": "processed"}
        self.files[name] = facts, content
        return facts

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        wrong = [name for name in ("input_file_id", "endpoint", "completion_window") if not isinstance(body.get(name), str)]
        if wrong or body["completion_window"] != "24h" or body["endpoint"] != "/v1/chat/completions":
            raise Refused(400, f"Invalid value for {wrong or 'completion_window or endpoint'}", "invalid_value")
        if self.files.get(body["input_file_id"], ({"purpose": ""},))[0]["purpose"] != "batch":
            raise Refused(400, f"Cannot find file {body['input_file_id']}, or it was not uploaded for batches.", None, "file_id")
        self.server.check_metadata(body.get("metadata"))
        name, now = f"batch_{self.server.number()}", int(time.time())
        times = dict.fromkeys(f"{state}_at" for state in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"))
        batch = {"id": name, "object": "batch", "created_at": now, "expires_at": now + 86_400, "status": "validating", "errors": None, "metadata": body.get("metadata")}
        batch |= times | {"output_file_id": None, "error_file_id": None, "request_counts": {"total": 0, "completed": 0, "failed": 0}}
        batch |= {part: body[part] for part in ("input_file_id", "endpoint", "completion_window")}
        fates = self.server.options.fates.split(",")
        fate = fates[len(self.made)] if len(self.made) < len(fates) else ""
        if fate == "refused":
            raise Refused(400, "Billing hard limit has been reached.", "billing_hard_limit_reached")
        self.made[name] = batch
        task = self.server.loop.create_task(self.work(batch, *(fate or "completed").split(":")))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return batch

    def read(self, content: bytes) -> list[dict[str, Any]]:
        """The lines of an input file.

        Raises:
            Refused: with the code that a failed batch has among its errors.
        """
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        names = Counter(line.get("custom_id") for line in lines)
        if not lines:
            raise Refused(400, "The batch has no requests.", "empty_file")
        if len(lines) > self.server.options.max_requests:
            raise Refused(400, f"The batch has more than {self.server.options.max_requests} requests.", "too_many_tasks")
        if len(names) < len(lines):
            raise Refused(400, f"The custom_id '{names.most_common(1)[0][0]}' is used more than once.", "duplicate_custom_id")
        if any((line["method"], line["url"]) != ("POST", "/v1/chat/completions") for line in lines):
            raise Refused(400, "The URL does not match the endpoint of the batch.", "mismatched_endpoint")
        if len({line["body"].get("model") for line in lines}) > 1:
            raise Refused(400, "The model is not the same in all requests.", "model_mismatch")
        return lines

    async def work(self, batch: dict[str, Any], fate: str, share: str = "1") -> None:
        server, seconds = self.server, self.server.options.batch_seconds

        def enter(status: str) -> None:
            batch.update({"status": status, f"{status}_at": int(time.time())})

        await asyncio.sleep(seconds / 5)
        content = self.files[batch["input_file_id"]][1]
        try:
            lines = self.read(content)
            batch["request_counts"]["total"] = len(lines)
            tokens = sum(server.prompt_tokens(line["body"]) for line in lines)
            if fate == "failed":
                raise Refused(400, "Invalid body for the request on line 1.", "invalid_request")
            if fate == "limit" or (server.options.enqueued and tokens + self.waiting.total() > server.options.enqueued):
                raise Refused(400, "Enqueued token limit reached. Please try again once some in_progress batches have been completed.", "token_limit_exceeded")
        except Refused as refused:
            batch["errors"] = {"object": "list", "data": [{"line": None, "param": None} | {name: refused.body["error"][name] for name in ("code", "message")}]}
            return enter("failed")
        self.waiting[batch["id"]] = tokens
        enter("in_progress")
        done = lines[: int(len(lines) * float(share))] if fate != "no_output" else []
        outputs, errors = [], []
        for step in range(STEPS):
            await asyncio.sleep(seconds * 3 / 5 / STEPS)
            if batch["status"] == "cancelling":
                fate = "cancelled"
                break
            for line in done[len(done) * step // STEPS : len(done) * (step + 1) // STEPS]:
                status, body = (500, Refused(500, "The server had an error.", kind="server_error").body) if fate == "errors" else self.one(line)
                (outputs if status == 200 else errors).append(self.line(line, {"status_code": status, "request_id": f"req_{server.number()}", "body": body}, None))
                batch["request_counts"]["completed" if status == 200 else "failed"] += 1
        enter("finalizing")
        if fate == "no_output":
            batch["request_counts"]["failed"] = len(lines)
        if fate == "expired":
            late = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}
            errors += [self.line(line, None, late) for line in lines[len(outputs) + len(errors) :]]
        if fate == "hasty":
            enter("completed")
        await asyncio.sleep(seconds / 5)
        for name, found in (("output_file_id", outputs), ("error_file_id", errors)):
            random.Random(batch["id"]).shuffle(found)  # no order is promised
            if found:
                made = self.keep("".join(json.dumps(line) + "\n" for line in found).encode(), "batch_output", f"{batch['id']}_{name}.jsonl")
                batch[name] = made["id"]
        self.ended_parts[hashlib.sha256(content).hexdigest()] += bool(outputs)
        del self.waiting[batch["id"]]
        return enter(fate if fate in ("expired", "cancelled") else "completed")

    def line(self, asked: dict[str, Any], response: Any, error: Any) -> dict[str, Any]:
        return {"id": f"batch_req_{self.server.number()}", "custom_id": asked["custom_id"], "response": response, "error": error}

    def one(self, line: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body for a line: what the transport does to a live request is a failed line here."""
        server, body = self.server, line["body"]
        try:
            server.check(body)
        except Refused as refused:
            return refused.status, refused.body
        name, question = server.question(body, line["custom_id"])
        kind = server.fault(name, question)
        if kind == "filter_400":
            question.finals += 1
            return 400, Refused(400, "The prompt triggered the content management policy.", "content_filter", "prompt", None).body
        if kind in ("retry_seconds", "retry_date"):
            return 429, Refused(429, "Rate limit reached.", "rate_limit_exceeded", kind="requests").body
        if kind in server.transport:
            return 500, Refused(500, "The server had an error while processing your request.", kind="server_error").body
        return 200, server.answer(body, name, question, line["custom_id"], kind, "batch")
