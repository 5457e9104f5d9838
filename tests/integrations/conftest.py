import pytest


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('one')}/f", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
