"""The engine as core's `Rollout`: what reinforcement learning, evaluation and the command line generate with."""

from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

import torch
from torch import Tensor

from ..core.generate import Completion, Rollout, Token
from ..core.model import DeepseekV3
from ..core.sampling_params import SamplingParams
from ..errors import UserError
from ..ops.cache_layout import cache_layout
from .engine import Decode, Engine, EngineSettings, Guides
from .messages import Add, Output, RequestRefused
from .request import Request
from .runner import ModelRunner, RunnerSettings
from .scheduler import Limits

STEP_TOKENS = 4096  # of one pass, where nobody waits for a steady stream
REQUESTS = 256  # that run at a time
RESERVE = 256  # tokens that the cache has room for at first, behind each prompt
CACHE_BYTES = 1 << 30  # of the cache, unless one text needs more or another size is asked for


class EngineRollout(Rollout):
    """Generates with `model` on an engine of this process.

    decode: text of token ids, for stop strings. cache_bytes: what the cache may grow to; it is as large as the requests
    need, up to that. speculative_tokens: drafted per step by the MTP module. requests: that run at a time. per_token:
    see RunnerSettings. guides: for requests that have one.
    """

    def __init__(
        self,
        model: DeepseekV3,
        decode: Decode | None = None,
        cache_dtype: torch.dtype | None = None,
        cache_bytes: int = CACHE_BYTES,
        speculative_tokens: int = 0,
        requests: int = REQUESTS,
        per_token: bool = False,
        guides: Guides | None = None,
    ) -> None:
        if speculative_tokens and not model.config.num_nextn_predict_layers:
            raise UserError("speculative decoding drafts with the MTP module, and this model has none; leave it off")
        self.model, self.decode, self.weight_version = model, decode, 0
        self.device = model.model.embed_tokens.weight.device
        self.cache_dtype = cache_dtype or model.model.embed_tokens.weight.dtype
        self.layout = cache_layout(model.config, self.cache_dtype)
        self.cache_bytes, self.speculative_tokens, self.requests = cache_bytes, speculative_tokens, requests
        self.per_token, self.guides = per_token, guides
        self._engine: Engine | None = None
        self._records = self._asleep = False

    # Rollout ----------------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        completions: list[Completion] | None = None,
        record_experts: bool = False,
    ) -> Generator[Token, None, None]:
        """Tokens as they come, of all prompts interleaved; `completions` is filled meanwhile. Closed early, the rest is
        given up. One call at a time."""
        chosen = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(chosen) != len(prompts):
            raise UserError(f"sampling: {len(prompts)} prompts with parameters for {len(chosen)}; give one for each")
        if self.decode is None and any(one.stop for one in chosen):
            raise UserError("stop strings need a tokenizer: pass decode= to EngineRollout")
        engine = self._engine_for(prompts, chosen, record_experts)
        made = [] if completions is None else completions
        experts: dict[int, Tensor | None] = {}
        try:
            for index, (prompt, one) in enumerate(zip(prompts, chosen, strict=True)):
                request = engine.add(Add(index, prompt, one), record_experts)
                made.append(Completion(request.tokens[:], request.seed, self.weight_version))
        except RequestRefused as refused:
            self._give_up(engine)
            raise UserError(str(refused)) from None

        def keep(request: Request) -> None:
            if record_experts:
                experts[request.id] = self._experts(request)

        engine.on_finish = keep
        try:
            while not engine.idle:
                self._grow(engine)
                if engine.compiling and engine.scheduler.idle:
                    wait([future for _, future in engine.compiling.values()], return_when=FIRST_COMPLETED)
                yield from self._told(engine.step(), made)
        finally:
            self._give_up(engine)
        for index, completion in enumerate(made):
            completion.experts = experts.get(index)

    def _told(self, outputs: Sequence[Output], completions: Sequence[Completion]) -> list[Token]:
        """What a step brought, into the completions and as a stream."""
        tokens = []
        for output in outputs:
            if output.finish in ("error", "refused"):
                raise UserError(output.error or "the engine failed")
            completion, last = completions[output.id], len(output.tokens) - 1
            completion.token_ids += output.tokens
            completion.logprobs += output.logprobs
            completion.finish_reason = output.finish
            for place, token in enumerate(output.tokens):
                tokens.append(Token(output.id, token, output.logprobs[place], output.finish if place == last else None))
        return tokens

    def weights_changed(self) -> int:
        self.model.refresh()
        self.weight_version += 1
        if self._engine is not None:
            assert isinstance(self._engine.runner, ModelRunner)
            self._engine.runner.weights_changed()
            self._engine.forget_prefixes()
        return self.weight_version

    # What it holds ----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Free the cache; on a device, the weights go to the host's memory too, and `wake` brings them back."""
        self._engine, self._asleep = None, True
        if self.device.type != "cpu":
            self.model.to("cpu")

    def wake(self) -> None:
        self._asleep = False
        if self.device.type != "cpu":
            self.model.to(self.device)

    def close(self) -> None:
        """Free the cache, and let go of what guides have running; a later call begins anew."""
        self._engine = None
        if self.guides is not None:
            self.guides.close()

    @property
    def engine(self) -> Engine | None:
        """The engine of the last call, for its counters."""
        return self._engine

    def _give_up(self, engine: Engine) -> None:
        for id in list(engine.requests):
            engine.abort(id)
        while not engine.idle:
            engine.step()
        engine.on_finish = None

    def _experts(self, request: Request) -> Tensor | None:
        """As `Completion.experts`: of every token but the last, which was only written."""
        assert self._engine is not None and isinstance(self._engine.runner, ModelRunner)
        return self._engine.runner.experts(request, len(request.tokens) - 1)

    def _engine_for(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], records: bool) -> Engine:
        """The engine that is there, unless a text of these needs a larger cache than that may grow to."""
        if self._asleep:
            raise UserError("the model sleeps; call wake() before it is to generate")
        context, page = self.model.config.max_position_embeddings, self.layout.page_size
        longest = max(
            (
                min(len(prompt) + (one.max_tokens or context), context)
                for prompt, one in zip(prompts, params, strict=True)
            ),
            default=page,
        )
        engine = self._engine
        if engine is None or engine.settings.capacity < longest:
            affordable = self.cache_bytes // (self.layout.bytes_per_page * self.model.config.num_layers_with_mtp)
            begin = sum(-(-min(len(prompt) + RESERVE, context) // page) for prompt in prompts[: self.requests])
            most = max(affordable, -(-longest // page))
            self._engine = None  # the old cache is freed before the new one is made
            engine = self._engine = self._make(min(begin + 1, most), most * page)
        elif records and not self._records:
            engine.forget_prefixes()  # computed while nobody kept what the gates chose
        self._records = records
        return engine

    def _grow(self, engine: Engine) -> None:
        """Twice the cache, where more would be done at once; copying then costs a constant per token."""
        runner, page = engine.runner, self.layout.page_size
        if runner.num_blocks * page < engine.settings.capacity and engine.scheduler.starved:
            assert isinstance(runner, ModelRunner)
            blocks = min(2 * runner.num_blocks, engine.settings.capacity // page)
            runner.grow(blocks)
            engine.scheduler.pools[0].grow(blocks)

    def _make(self, blocks: int, capacity: int) -> Engine:
        # On a device, capturing takes longer than most calls, and growth would have it done again.
        captured = self.device.type == "cpu" and not self.per_token
        settings = RunnerSettings(
            blocks, self.requests, self.cache_dtype, self.speculative_tokens, self.per_token, captured
        )
        config, limits = self.model.config, Limits(self.requests, STEP_TOKENS, float("inf"))
        chosen = EngineSettings(
            config.max_position_embeddings, config.vocab_size, capacity, frozenset(config.eos_token_ids), limits=limits
        )
        return Engine(ModelRunner(self.model, settings), chosen, self.decode, self.guides)
