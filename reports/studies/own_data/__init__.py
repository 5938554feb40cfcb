"""Five kinds of a user's own data, trained with no number given by hand: the record and its page."""
