"""Where latencies are kept: tables, named queries, transactions and migrations. Needs the extra `storage`."""

from lut_db.storage.session import Database

__all__ = ["Database"]
