// A cell that is focused or pointed at is said below its picture; arrow keys go from cell to cell.
for (const figure of document.querySelectorAll("figure")) {
  const says = figure.querySelector("output");
  const show = (cell) => { if (cell) says.textContent = cell.querySelector("title").textContent; };
  figure.addEventListener("pointerover", (event) => show(event.target.closest(".cell")));
  figure.addEventListener("focusin", (event) => show(event.target.closest(".cell")));
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const cell = event.target.closest(".cell");
    if (!step || !cell) return;
    const row = Number(cell.dataset.row) + step[0], column = Number(cell.dataset.column) + step[1];
    const next = cell.parentNode.querySelector(`[data-row="${row}"][data-column="${column}"]`);
    event.preventDefault();
    if (!next) return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
