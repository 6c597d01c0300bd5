"""How Alembic runs the steps: on the connection it is handed, in that one's transaction."""

from __future__ import annotations

from alembic import context

from tessera.serve import schema

__all__ = ["run"]


def run() -> None:
    """Run the steps that `alembic.command` asked for."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=schema.metadata,
    )
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # so Alembic loads it; whoever imports it has no context
    run()
