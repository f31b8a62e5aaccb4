"""Where encoded images lie: memory, datasets, files, tar shards, Parquet tables. All are read by position.

Tables of names and offsets are flat arrays, which the forks of a loader share, however many images there are.
"""

from poa.data.storage.array import Arrays, load_digits
from poa.data.storage.base import EXTENSIONS, Opened, Storage
from poa.data.storage.dataset import open_dataset
from poa.data.storage.folder import Files, read_folder, read_list
from poa.data.storage.parquet import open_parquet
from poa.data.storage.remote import Place, Url, is_url, list_urls
from poa.data.storage.tar import list_shard, open_shards

__all__ = [
    "EXTENSIONS", "Arrays", "Files", "Opened", "Place", "Storage", "Url", "is_url", "list_shard", "list_urls",
    "load_digits", "open_dataset", "open_parquet", "open_shards", "read_folder", "read_list",
]  # fmt: skip
