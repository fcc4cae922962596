"""What people read: screens and tables of plans, timelines, and what explains a number."""
