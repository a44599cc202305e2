"""The SQLite ledger, the results that go into it, and folders of files."""
