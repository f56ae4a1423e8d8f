"""Files of local disks and object stores: read, written, listed and locked under one contract.

*Atomic*: ``files.write_atomically`` and all that is built on it. A reader finds the older file or the whole
new one, never a part. Several files cannot be written as one: the decisive one is written last.

*Signals*: an interrupt within a write is raised once the write has ended (``uninterrupted``). A process that
is killed leaves the older file or the new one, and locally perhaps a temporary file that no listing shows
and ``files.delete_leftovers`` removes.

*Conditional*: ``exclusive`` creates a file that does not exist yet, and replaces one that has not changed
since it was read. Locally that is a hard link and a rename; on S3 it is ``If-None-Match`` and ``If-Match``
(``conditional``, by boto3, since Arrow's file system has no such requests). If a server does not support
them, the log says so once, and the code looks before it writes instead.

*Locked*: ``lock.StoreLock`` lets one job at a time write a folder, and ``generations`` makes void what a job
writes after it has lost the lock unnoticed. docs/design/store-writers.md has the model and its invariants.

*Faults*: ``DataError`` with the location, never an exception of pyarrow or boto3; ``FullDiskError`` for lack
of room. ``patience.retry_until_answered`` waits for a storage that does not answer.
"""
