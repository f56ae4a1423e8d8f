"""Files of local disks and object stores: read, written, listed and locked under one contract.

*Atomic*: ``files.write_atomically`` and all that is built on it. A reader finds the older file or the whole
new one, never a part. Two files are never written together: of several, the one that counts is written last.

*Signals*: an interrupt within a write is raised once the write has ended (``uninterrupted``). A process that
is killed leaves the older file or the new one, and locally perhaps a temporary file that no listing shows
and ``files.delete_leftovers`` removes.

*Conditional*: ``exclusive`` creates a file that nobody has created yet, and replaces one that is as it was
found. Locally that is a hard link and a rename; on S3 it is ``If-None-Match`` and ``If-Match``
(``conditional``, by boto3, since Arrow's file system has no such requests). Of a server that does not know
them the log says so once; there a look before the write has to do.

*Locked*: ``lock.StoreLock`` lets one job at a time write a folder, and ``generations`` makes void what a job
writes that was taken over without noticing. docs/design/store-writers.md has the model and its invariants.

*Faults*: ``DataError`` with the location, never an exception of pyarrow or boto3; ``FullDiskError`` for lack
of room. ``patience.patiently`` waits for a storage that does not answer.
"""
