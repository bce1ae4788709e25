"""Runs migrations inside the connection and transaction that `Database.upgrade` opened."""

from __future__ import annotations

from alembic import context

from lut_db.errors import InvalidInput
from lut_db.storage.models import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise InvalidInput("migrations need a database", field="connection", remedy="run: lut-db upgrade --database URL")
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
