"""What people see: screens for the terminal and pictures as files."""
