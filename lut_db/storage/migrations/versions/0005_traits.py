"""What corrections ask of an operator stands beside its definition."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

from lut_db.networks import Network
from lut_db.operators import OPERATOR

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

AT_ONCE = 1000


def upgrade() -> None:
    # The defaults stay: without them SQLite would have to make the table anew, to which others refer.
    op.add_column("workloads", sa.Column("family", sa.String(64), nullable=False, server_default=""))
    op.add_column("workloads", sa.Column("parameters", sa.BigInteger(), nullable=False, server_default="0"))
    bind = op.get_bind()
    workloads = sa.table("workloads", *map(sa.column, ("key", "kind", "definition", "family", "parameters")))
    query = sa.select(workloads.c.key, workloads.c.kind, workloads.c.definition).order_by(workloads.c.key)
    change = (
        workloads.update()
        .where(workloads.c.key == sa.bindparam("of"))
        .values(family=sa.bindparam("told_family"), parameters=sa.bindparam("told_parameters"))
    )
    for some in list(bind.execute(query).partitions(AT_ONCE)):
        values = []
        for key, kind, stored in some:
            definition = json.loads(stored) if isinstance(stored, str) else stored
            known = Network.model_validate(definition) if kind == "network" else OPERATOR.validate_python(definition)
            family = kind if isinstance(known, Network) else known.family
            values.append({"of": key, "told_family": family, "told_parameters": known.parameters})
        bind.execute(change, values)


def downgrade() -> None:
    op.drop_column("workloads", "parameters")
    op.drop_column("workloads", "family")
