"""Many specialised models of one base, served from one KV cache."""

from jaxcodec.serve.async_engine import AsyncEngine as AsyncEngine
from jaxcodec.serve.batch_loop import generate as generate
from jaxcodec.serve.batch_loop import stream as stream
from jaxcodec.serve.buckets import Buckets as Buckets
from jaxcodec.serve.compilation import use_compilation_cache as use_compilation_cache
from jaxcodec.serve.engine import Engine as Engine
from jaxcodec.serve.request import QueueFull as QueueFull
from jaxcodec.serve.request import Request as Request
from jaxcodec.serve.request import RequestOutput as RequestOutput
from jaxcodec.serve.request import SamplingParams as SamplingParams
from jaxcodec.serve.request import Structure as Structure
from jaxcodec.serve.request import TextDelta as TextDelta
from jaxcodec.serve.served_models import bank_for as bank_for
from jaxcodec.serve.statistics import EngineStats as EngineStats
from jaxcodec.serve.timeline import Timeline as Timeline
from jaxcodec.serve.timeline import write_chrome_trace as write_chrome_trace
