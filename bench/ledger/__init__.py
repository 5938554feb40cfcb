"""Every storage from birth to death, with the role it plays."""
