"""What is planned: models, machines, jobs and software, read strictly from files into frozen dataclasses."""
