"""The tests of engines run where the engine is installed: `make test-vllm`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_vllm*.py"]
