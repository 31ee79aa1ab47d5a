"""The report of a run: `report.md` and `report.png` beside the adapter, for people; serving reads neither.

run.py         `RunReport`, all that a report says
markdown.py    its text and tables
figure.py      its curves and confusion matrix (matplotlib, of the extra `train`)
fonts.py       letters that a font of this machine has, for labels in any script
write.py       `write_report`
"""
