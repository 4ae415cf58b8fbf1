(function () {
  "use strict";
  var described = document.getElementById("described");
  if (!described) return;
  var cells = Array.prototype.slice.call(document.querySelectorAll(".map td.cell"));
  var on = null;
  function show(cell) {
    if (on) on.classList.remove("on");
    on = cell;
    cell.classList.add("on");
    described.textContent = cell.title + ". ";
    var drawn = document.getElementById("s" + cell.dataset.n);
    if (drawn) {
      var link = document.createElement("a");
      link.href = "#s" + cell.dataset.n;
      link.textContent = "Its spectrum";
      link.addEventListener("click", function () { drawn.closest("details").open = true; });
      described.appendChild(link);
    }
  }
  cells.forEach(function (cell) {
    cell.addEventListener("mouseenter", function () { show(cell); });
    cell.addEventListener("click", function () { show(cell); });
  });
  var box = document.querySelector(".map").parentElement;
  box.addEventListener("keydown", function (event) {
    var step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    if (!on) return show(cells[0]);
    var row = on.parentElement, place = on.cellIndex;
    do {
      place += step[0];
      row = step[1] > 0 ? row.nextElementSibling : step[1] < 0 ? row.previousElementSibling : row;
    } while (row && row.cells[place] && !row.cells[place].classList.contains("cell"));
    if (row && row.cells[place] && place > 0) {
      show(row.cells[place]);
      row.cells[place].scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  });
})();
