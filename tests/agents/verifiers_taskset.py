"""A small taskset and harness of the `verifiers` package: a sum, with a tool that the harness itself answers."""

import json

import verifiers.v1 as vf

__all__ = ["SumHarness", "SumTaskset"]


class SumData(vf.TaskData):
    answer: str = ""


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))


class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> list[SumTask]:
        return [SumTask(SumData(prompt=f"What is {n} + {n}? Use add.", answer=str(2 * n)), self.config.task) for n in (4, 70)]


class SumHarness(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> vf.ProgramResult:
        from openai import AsyncOpenAI

        function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
        messages = [{"role": "user", "content": data.prompt}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            for _ in range(4):
                reply = await client.chat.completions.create(
                    model=ctx.model, messages=messages, tools=[{"type": "function", "function": function}]
                )
                said = reply.choices[0].message
                messages.append(said.model_dump(exclude_none=True))
                if not said.tool_calls:
                    break
                for call in said.tool_calls:
                    arguments = json.loads(call.function.arguments)
                    content = str(arguments["a"] + arguments["b"])
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
