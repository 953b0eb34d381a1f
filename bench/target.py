"""From an order to a server that has answered: which one it is, and which way of asking it accepts."""

from dataclasses import dataclass

import aiohttp

from energyd.daemon.errors import UsageError

from .order import Order
from .payloads import Api, Dialect, Generation, dialects
from .servers import Detected, detect, probe, public, root


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers. `metered`: the answers carry our id, so the URL leads through energyd's proxy."""

    base: str
    server: Detected
    dialect: Dialect
    metered: bool
    generation: Generation

    @property
    def url(self) -> str:
        """Where samples are posted."""
        return self.base + self.dialect.api.path

    @property
    def public_url(self) -> str:
        """The server's root without anything secret."""
        return public(self.base)


async def resolve(order: Order, client: aiohttp.ClientSession) -> Target:
    """Detect and probe; raises UnavailableError or UsageError, one line, if the server cannot be used."""
    base = root(order.url)
    server = Detected(order.server, None) if order.server else await detect(client, base)
    count = order.max_new_tokens or order.task.max_new_tokens
    if count is None:
        raise UsageError(f"{order.task.task_id} makes no tokens; it cannot be replayed to chat or completions")
    generation = Generation(count, order.task.fixed_tokens)
    ways = tuple(dialects(server.kind, _apis(order), generation, stream=order.stream))
    probed = await probe(client, base, order.model, ways, generation)
    return Target(base, server, probed.dialect, probed.metered, generation)


def _apis(order: Order) -> tuple[Api, ...]:
    """Completions continues the bare text, as the published protocol does; conversations only make sense as chat."""
    if order.api:
        return (order.api,)
    is_talk = order.dataset.prompts[0].messages is not None
    return (Api.CHAT,) if is_talk else (Api.COMPLETIONS, Api.CHAT)
