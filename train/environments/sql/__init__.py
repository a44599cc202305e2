"""Questions about generated databases, and the judging of the SQL that answers them."""
