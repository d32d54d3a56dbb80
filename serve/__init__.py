"""Many specialised models of one base, served from one KV cache."""

from jaxcodec.serve.batch_loop import generate as generate
from jaxcodec.serve.batch_loop import stream as stream
from jaxcodec.serve.engine import Engine as Engine
from jaxcodec.serve.engine import EngineStats as EngineStats
from jaxcodec.serve.request import Request as Request
from jaxcodec.serve.request import RequestOutput as RequestOutput
from jaxcodec.serve.request import SamplingParams as SamplingParams
from jaxcodec.serve.request import TextDelta as TextDelta
