"""A model that says what a test gives it, in order."""

from openkeye.agents.model_client import ModelReply


class SayingModel:
    """`ModelClient` whose replies are given."""

    name = "saying"

    def __init__(self, texts):
        self.texts = list(texts)
        self.asked = []

    async def reply(self, messages, tools=()):
        self.asked.append(list(messages))
        return ModelReply(self.texts[len(self.asked) - 1])
