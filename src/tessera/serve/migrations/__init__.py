"""The steps that bring a database to the tables of `tessera.serve.schema`; Alembic's."""
