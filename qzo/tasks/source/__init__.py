"""Where rows come from: files of every usual kind, a folder, a package, the hub; errors name file and line."""
